"""`kill -9` of the flow process in each phase: the next attempt ends as if nothing had happened."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_flows.errors import RunBusyError
from tests.end_to_end.processes import (
    assert_ended,
    generated,
    pids,
    run_victim,
    start_victim,
    watched,
)
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    evaluated_versions,
    learn,
    toy_engine,
)

RUNTIME: dict[str, Any] = {"num_episode": 4, "eval_episode_interval": 1, "max_attempts": 20}

POINTS = [
    "advanced evaluation 0 1",
    "advanced rollout 0 2",
    "advanced scoring 0 1",
    "advanced training 0 1",
    "before commit 0",
    "after commit 0",
    "started param_sync 1",
    "finished param_sync 1",
    "advanced rollout 1 4",
    "finished scoring 1",
    "before commit 1",
    "started training 2",
    "after commit 2",
    "started evaluation 3",
    "advanced training 3 1",
    "started param_sync 4",
    "advanced evaluation 4 1",
]
"""In the order in which a run meets them, so that one run can die at each."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(store: Path, services: str) -> str:
    log = store / "undisturbed.calls"
    learn(toy_engine(log=log), store, "undisturbed", **RUNTIME)
    return "undisturbed"


@pytest.fixture
def released(services: str) -> Iterator[str]:
    """The head's address; actors that the test leaves are ended."""
    yield services
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        ray.kill(ray.get_actor(actor["name"], actor["namespace"]))


@pytest.mark.slow
def test_a_run_killed_at_every_point_ends_with_the_bits_of_an_undisturbed_one(
    store: Path, undisturbed: str, released: str
) -> None:
    log = store / "killed.calls"
    for point in POINTS:
        code = run_victim(store, "killed", log, die=point, address=released, **RUNTIME)
        assert code == -signal.SIGKILL, f"at {point}: {(store / 'killed.log').read_text()[-3000:]}"
    result = learn(toy_engine(log=log), store, "killed", address=released, **RUNTIME)
    assert result.version == 4
    assert_same_bits(store, "killed", reference=undisturbed)
    assert_exactly_once(store, "killed", episodes=4)
    assert evaluated_versions(store, "killed") == [0, 1, 2, 3, 4]
    # The pools lived through it all, and no finished shard was generated again.
    assert len(pids(log)) == 1
    ids = generated(log)
    in_flight = len(ids) - len(set(ids))
    assert in_flight <= 8 * len([p for p in POINTS if "rollout" in p or "evaluation" in p])


@pytest.mark.slow  # another victim
def test_the_actors_of_a_run_that_was_killed_when_all_was_done_are_ended_by_the_next_attempt(
    store: Path, released: str
) -> None:
    log = store / "done.calls"
    once: dict[str, Any] = {"address": released, "num_episode": 1}
    code = run_victim(store, "done", log, die="finished evaluation 1", **once)
    assert code == -signal.SIGKILL, (store / "done.log").read_text()[-3000:]
    assert len(_actors_of("done")) == 3
    learn(toy_engine(log=log), store, "done", **once)
    deadline = time.monotonic() + 20
    while _actors_of("done") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _actors_of("done") == []


def _actors_of(run: str) -> list[str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"].endswith(f"/{run}")]


@pytest.mark.long  # two heads and two servers start: a minute
def test_a_run_with_services_of_its_own_starts_cold_after_a_kill_and_leaves_no_process(
    store: Path, undisturbed: str
) -> None:
    log, output = store / "cold.calls", store / "cold.log"
    alone: dict[str, Any] = {"address": None, "own_server": True, **RUNTIME}
    victim = start_victim(store, "cold", log, die="advanced training 1 1", **alone)
    offspring = watched(victim, timeout_s=200)
    assert victim.returncode == -signal.SIGKILL, output.read_text()[-3000:]
    # The head and the server that it started died with it, and so did its actors.
    assert_ended(offspring, timeout_s=20)

    before = generated(log)
    second = start_victim(store, "cold", log, die="never", **alone)
    offspring = watched(second, timeout_s=200)
    ended = time.time()
    assert second.returncode == 0, output.read_text()[-3000:]
    assert_ended(offspring, timeout_s=15)
    finished = float(output.read_text().split("finished at ")[1].split()[0])
    assert ended - finished < 15, "leaving took long"

    assert_same_bits(store, "cold", reference=undisturbed)
    # Both sampled episodes were there: nothing of them was made again.
    assert [i for i in generated(log)[len(before) :] if i < "e000002"] == []
    assert len(pids(log)) == 2


@pytest.mark.slow
def test_a_stopped_attempt_is_not_replaced_unasked_and_is_fenced_when_it_wakes(
    store: Path, undisturbed: str, released: str
) -> None:
    log = store / "zombie.calls"
    zombie = start_victim(
        store,
        "zombie",
        log,
        die="advanced rollout 1 2",
        address=released,
        signal_name="SIGSTOP",
        **RUNTIME,
    )
    try:
        deadline = time.monotonic() + 120
        while psutil.Process(zombie.pid).status() != psutil.STATUS_STOPPED:
            assert zombie.poll() is None, (store / "zombie.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(RunBusyError, match=r"attempt 1 is alive .* --takeover"):
            learn(toy_engine(log=log), store, "zombie", address=released, **RUNTIME)
        learn(toy_engine(log=log), store, "zombie", address=released, takeover=True, **RUNTIME)
        zombie.send_signal(signal.SIGCONT)
        assert zombie.wait(timeout=60) == 1
    finally:
        zombie.kill()
        zombie.wait()
    last = (store / "zombie.log").read_text().splitlines()
    assert "FencedError" in "\n".join(last[-5:])
    assert_same_bits(store, "zombie", reference=undisturbed)
    assert_exactly_once(store, "zombie", episodes=4)
    assert len(pids(log)) == 1
