"""Nodes that die under a run: a worker node, one rank of a group, the head."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.cluster import TestCluster, ray_cluster
from tests.end_to_end.processes import generated, pids, start_victim
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    learn,
    toy_engine,
)

# Each test starts a cluster of its own, some 30 s a node on two cores.
pytestmark = pytest.mark.slow

EPISODES = 3
RUNTIME: dict[str, Any] = {"num_episode": EPISODES, "eval_episode_interval": 1}
ON_A_NODE = {name: {"num_cpu": 1.0} for name in ("policy", "trainer", "reward")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, services: str) -> Path:
    """With a run that nobody disturbed."""
    store = tmp_path_factory.mktemp("nodes")
    learn(toy_engine(log=store / "undisturbed.calls"), store, "undisturbed", **RUNTIME)
    return store


@pytest.fixture
def cluster(tmp_path: Path, prefect_server: str) -> Iterator[TestCluster]:
    with ray_cluster(tmp_path) as cluster:
        yield cluster


def start(store: Path, run: str, cluster: TestCluster, *, slow_s: float) -> subprocess.Popen[bytes]:
    return start_victim(
        store,
        run,
        store / f"{run}.calls",
        die="never",
        address=cluster.address,
        environment=cluster.environment,
        models=ON_A_NODE,
        slow_s=slow_s,
        **RUNTIME,
    )


def wait_for_samples(log: Path, count: int, process: Any) -> None:
    deadline = time.monotonic() + 180
    while not log.exists() or len(generated(log)) < count:
        assert process.poll() is None, log.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, log.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.05)


def test_a_run_whose_worker_node_dies_goes_on_where_there_is_room(
    store: Path, cluster: TestCluster
) -> None:
    log = store / "node.calls"
    nodes = [cluster.add_node(num_cpus=3), cluster.add_node(num_cpus=3)]
    run = start(store, "node", cluster, slow_s=0.3)
    try:
        wait_for_samples(log, 16 + 24, run)  # in rollout of episode 0, after its evaluation
        (sampler,) = pids(log)
        (doomed,) = [node for node in nodes if node.has(sampler)]
        doomed.kill()
        code = run.wait(timeout=180)
    finally:
        run.kill()
        run.wait()
    assert code == 0, log.with_suffix(".log").read_text()[-5000:]
    assert len(pids(log)) == 2
    assert_same_bits(store, "node", reference="undisturbed")
    assert_exactly_once(store, "node", episodes=EPISODES)


@pytest.mark.long
def test_the_loss_of_the_head_ends_the_attempt_by_name_and_the_next_one_starts_cold(
    store: Path, cluster: TestCluster
) -> None:
    log = store / "head.calls"
    port = cluster.address.partition(":")[2]
    cluster.add_node(num_cpus=3)
    run = start(store, "head", cluster, slow_s=3.0)
    try:
        wait_for_samples(log, 16 + 24, run)
        cluster.head.kill()
        lost = time.monotonic()
        code = run.wait(timeout=120)
    finally:
        run.kill()
        run.wait()
    said = log.with_suffix(".log").read_text()
    assert code == 1, said[-5000:]
    assert re.search(rf"the head of the Ray cluster at \S+:{port} is gone", said[-5000:])
    # Named after 15 s; Ray waits for its head for a minute before it lets the process end.
    assert time.monotonic() - lost < 90
    learn(toy_engine(log=log), store, "head", **RUNTIME)
    assert_same_bits(store, "head", reference="undisturbed")
    assert_exactly_once(store, "head", episodes=EPISODES)
