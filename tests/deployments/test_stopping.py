"""Deployed runs that a person, or Prefect, stops: cancelled, suspended, replaced while they live.

A real server, a real worker; toys, so that a test is mostly the start of flow processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType
from prefect.states import Crashed, Suspended

from tests.deployments.worker import (
    attempt,
    deploy_toy,
    existing,
    history,
    in_state,
    outcome,
    prefect,
    process_worker,
    wait_for,
    wait_for_worker,
)
from tests.end_to_end.processes import generated, pids
from tests.end_to_end.whole_run import (
    RUNTIME,
    assert_exactly_once,
    assert_same_bits,
    learn,
    toy_engine,
)

# A worker starts seven flow processes, one after the other: half a minute a test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPISODES = 4
STOPS_WITHIN_S = 60.0
"""It takes 2 to 5 s where nothing else is at work, as is printed."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def undisturbed(store: Path, client: SyncPrefectClient, ray_head: str) -> str:
    learn(toy_engine(eval_rows=0), store, "undisturbed", num_episode=EPISODES)
    return "undisturbed"


@pytest.fixture(scope="module")
def deployment(client: SyncPrefectClient, store: Path) -> Iterator[UUID]:
    with process_worker(store / "worker.log"):
        yield deploy_toy(client)


class Started:
    """A run of the deployment that is in its second episode."""

    def __init__(
        self, client: SyncPrefectClient, deployment: UUID, store: Path, cluster: dict[str, Any]
    ) -> None:
        self.client = client
        self.log = store / f"{time.monotonic_ns()}.calls"
        runtime = {**RUNTIME, "num_episode": EPISODES}
        parameters: dict[str, Any] = {
            "store": str(store),
            "cluster": cluster,
            "log": str(self.log),
            "slow_s": 1.0,
            "runtime": runtime,
        }
        self.id = client.create_flow_run_from_deployment(deployment, parameters=parameters).id
        before = set(store.glob("toy-*"))
        self.folder = wait_for("the run", lambda: next(iter({*store.glob("toy-*")} - before), None))
        self.name = self.folder.name
        shard = self.folder / "episodes/episode=000001/rollout/shard-00000.parquet"
        wait_for("the second episode", lambda: existing(shard), timeout_s=180)
        self.process = psutil.Process(attempt(self.folder, 1)["pid"])

    def ends(self, state: str) -> None:
        found = wait_for(
            "the end", lambda: in_state(self.client, self.id, "COMPLETED", "FAILED", "CRASHED")
        )
        assert found.state is not None
        assert found.state_type is not None
        assert found.state_type.value == state, found.state.message

    def stops(self) -> None:
        began = time.monotonic()
        wait_for(
            "the release of the pools, or the last word",
            lambda: outcome(self.folder, 1),
            timeout_s=STOPS_WITHIN_S,
        )
        said = time.monotonic() - began
        psutil.wait_procs([self.process], timeout=STOPS_WITHIN_S)
        assert not self.process.is_running()
        ended = time.monotonic() - began
        print(f"ended.json after {said:.1f} s, the process has ended after {ended:.1f} s")

    def actors(self) -> list[str]:
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        return [a["name"] for a in named if a["namespace"].endswith(self.name)]


@pytest.fixture
def started(client: SyncPrefectClient, deployment: UUID, store: Path, ray_head: str) -> Started:
    return Started(client, deployment, store, {"address": ray_head})


def test_a_cancelled_run_stops_soon_releases_its_pools_and_resumes_to_the_same_bits(
    started: Started, store: Path, undisturbed: str
) -> None:
    # As `prefect flow-run cancel` does it, and the button of the UI.
    started.client.set_flow_run_state(started.id, State(type=StateType.CANCELLING))
    started.stops()
    # Ray takes note of the end of an actor after it was asked for.
    wait_for("the release of the pools", lambda: None if started.actors() else True, timeout_s=60)
    assert outcome(started.folder, 1) == "cancelled"
    wait_for("the state", lambda: in_state(started.client, started.id, "CANCELLED"))
    wait_for_worker(started.client, started.id)
    # The watch of the run and the worker may both say the last word.
    states = history(started.client, started.id)
    states = states[states.index("Cancelling") :]
    assert set(states[1:]) == {"Cancelled"}, states
    assert not list(started.folder.rglob("*.tmp*"))

    prefect("flow-run", "retry", str(started.id))
    started.ends("COMPLETED")
    assert_same_bits(store, started.name, reference=undisturbed)
    assert_exactly_once(store, started.name, episodes=EPISODES)


@pytest.mark.long
def test_a_cancelled_run_keeps_its_pools_where_that_is_asked_for(
    client: SyncPrefectClient, deployment: UUID, store: Path, ray_head: str
) -> None:
    cluster = {"address": ray_head, "keep_pools_on_cancel": True, "lease_s": 60}
    started = Started(client, deployment, store, cluster)
    started.client.set_flow_run_state(started.id, State(type=StateType.CANCELLING))
    started.stops()
    assert outcome(started.folder, 1) == "cancelled"
    assert len(started.actors()) == 3


def test_a_flow_process_that_is_asked_to_leave_is_terminated_and_another_one_takes_its_pools(
    started: Started, store: Path, undisturbed: str
) -> None:
    # As a node that is drained does it; nobody cancelled the run.
    started.process.terminate()
    started.stops()
    assert outcome(started.folder, 1) == "terminated"
    assert len(started.actors()) == 3

    wait_for("the state", lambda: in_state(started.client, started.id, "CRASHED"))
    wait_for_worker(started.client, started.id)
    prefect("flow-run", "retry", str(started.id))
    started.ends("COMPLETED")
    assert_same_bits(store, started.name, reference=undisturbed)
    assert_exactly_once(store, started.name, episodes=EPISODES)
    assert len(pids(started.log)) == 1, "the pools were loaded again"


def test_a_suspended_run_leaves_its_pools_to_the_process_that_resumes_it(
    started: Started, store: Path, undisturbed: str
) -> None:
    # As the button of the UI does it.
    started.client.set_flow_run_state(started.id, Suspended(timeout_seconds=600))
    started.stops()
    assert outcome(started.folder, 1) == "suspended"
    assert len(started.actors()) == 3
    wait_for_worker(started.client, started.id)
    assert in_state(started.client, started.id, "PAUSED")

    started.client.resume_flow_run(started.id)
    started.ends("COMPLETED")
    assert_same_bits(store, started.name, reference=undisturbed)
    assert len(pids(started.log)) == 1, "the pools were loaded again"
    calls = generated(started.log)
    assert len(calls) - len(set(calls)) <= RUNTIME["generation_batch_size"]


@pytest.mark.long
@pytest.mark.parametrize(("said", "kept"), [("suspended", 3), ("cancelled", 0)])
def test_a_subflow_hears_what_is_done_to_the_flow_run_that_was_started(
    said: str, kept: int, client: SyncPrefectClient, deployment: UUID, store: Path, ray_head: str
) -> None:
    started = Started(client, deploy_toy(client, "nested"), store, {"address": ray_head})
    is_suspended = said == "suspended"
    state = Suspended(timeout_seconds=600) if is_suspended else State(type=StateType.CANCELLING)
    client.set_flow_run_state(started.id, state)
    started.stops()
    assert outcome(started.folder, 1) == said
    wait_for("the pools", lambda: len(started.actors()) == kept or None, timeout_s=60)
    assert attempt(started.folder, 1)["flow_run_id"] == str(started.id)
    wait_for("the state", lambda: in_state(client, started.id, "PAUSED", "CANCELLED"))


def crashed_and_retried(started: Started) -> None:
    started.client.set_flow_run_state(started.id, Crashed(message="no heartbeat"))
    prefect("flow-run", "retry", str(started.id))


def suspended_and_resumed(started: Started) -> None:
    started.client.set_flow_run_state(started.id, Suspended(timeout_seconds=600))
    started.client.resume_flow_run(started.id)


@pytest.mark.parametrize(
    "given_to_another",
    [crashed_and_retried, pytest.param(suspended_and_resumed, marks=pytest.mark.long)],
)
def test_a_flow_run_that_another_process_has_is_not_disturbed_by_the_first_one_that_still_lives(
    started: Started,
    store: Path,
    undisturbed: str,
    given_to_another: Callable[[Started], None],
) -> None:
    # What a network does, or a machine that swaps: no sign of life, and not dead.
    os.kill(started.process.pid, signal.SIGSTOP)
    try:
        given_to_another(started)
        wait_for("attempt 2", lambda: existing(started.folder / "attempts/000002.json"))
        calls = len(generated(started.log))
        wait_for("its work", lambda: len(generated(started.log)) > calls or None)
    finally:
        os.kill(started.process.pid, signal.SIGCONT)
    psutil.wait_procs([started.process], timeout=60)
    assert not started.process.is_running()
    assert outcome(started.folder, 1) == "fenced"
    started.ends("COMPLETED")
    states = history(started.client, started.id)
    assert states.count("Crashed") <= 1, states
    assert "Failed" not in states
    assert states[-2:] == ["Running", "Completed"], states
    assert_same_bits(store, started.name, reference=undisturbed)
    assert_exactly_once(store, started.name, episodes=EPISODES)
    assert len(pids(started.log)) == 1
