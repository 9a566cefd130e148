"""The automations on a server that runs them: killed flow runs go on without a person."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf_flows.services.automations import Delays, install, installed, remove
from tests.deployments.worker import (
    POOL,
    attempt,
    deploy_toy,
    existing,
    history,
    in_state,
    kill_group,
    prefect,
    process_worker,
    wait_for,
)
from tests.end_to_end.processes import pids
from tests.end_to_end.whole_run import RUNTIME, assert_exactly_once

# A server of its own (that of other tests runs no triggers), and delays that are the point.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPISODES = 3
DELAYS = Delays(restart_s=15, heartbeat_s=60, crashes_per_hour=2)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """Of a server with all its services, which the environment names while this module runs."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env={**os.environ, "PREFECT_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", url)
        try:
            wait_for("the server", lambda: _answers(url), timeout_s=120)
            with (
                temporary_settings({PREFECT_API_URL: url}),
                get_client(sync_client=True) as client,
            ):
                prefect("work-pool", "create", POOL, "--type", "process")
                install(client, DELAYS)
                yield client
        finally:
            kill_group(server)


def _answers(url: str) -> bool | None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def start_toy(client: SyncPrefectClient, store: Path, address: str, *, slow_s: float = 0.5) -> UUID:
    parameters: dict[str, Any] = {
        "store": str(store),
        "address": address,
        "log": str(store / "calls"),
        "slow_s": slow_s,
        "runtime": {**RUNTIME, "num_episode": EPISODES},
    }
    return client.create_flow_run_from_deployment(deploy_toy(client), parameters=parameters).id


def wait_for_work(store: Path, flow_run_id: UUID) -> Path:
    folder = store / f"toy-{flow_run_id}"
    shard = folder / "episodes/episode=000000/rollout/shard-00001.parquet"
    wait_for("the first shards", lambda: existing(shard), timeout_s=180)
    return folder


def test_installing_twice_leaves_three_and_removing_none(client: SyncPrefectClient) -> None:
    install(client, DELAYS)
    names = [a.name for a in installed(client)]
    assert names == ["rlhf-flows: give up", "rlhf-flows: heartbeat", "rlhf-flows: restart"]
    assert sorted(remove(client)) == names
    assert installed(client) == []
    install(client, DELAYS)


def test_a_killed_flow_process_is_followed_by_another_one_with_the_same_pools(
    client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    with process_worker(tmp_path / "worker.log"):
        flow_run_id = start_toy(client, tmp_path, ray_head)
        folder = wait_for_work(tmp_path, flow_run_id)
        os.kill(attempt(folder, 1)["pid"], signal.SIGKILL)
        wait_for("the end", lambda: in_state(client, flow_run_id, "COMPLETED"), timeout_s=120)
    states = history(client, flow_run_id)
    assert [s for s in states if s in ("Crashed", "AwaitingRetry", "Failed")] == [
        "Crashed",
        "AwaitingRetry",
    ]
    assert states[-1] == "Completed"
    assert_exactly_once(tmp_path, folder.name, episodes=EPISODES)
    assert len(pids(tmp_path / "calls")) == 1


def test_a_run_whose_worker_died_with_it_goes_on_at_another_worker(
    client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    with process_worker(tmp_path / "first.log") as worker:
        flow_run_id = start_toy(client, tmp_path, ray_head)
        folder = wait_for_work(tmp_path, flow_run_id)
        os.kill(attempt(folder, 1)["pid"], signal.SIGSTOP)  # so that it cannot say a last word
        kill_group(worker)
        os.kill(attempt(folder, 1)["pid"], signal.SIGKILL)
    with process_worker(tmp_path / "second.log"):
        wait_for("the end", lambda: in_state(client, flow_run_id, "COMPLETED"), timeout_s=240)
    assert history(client, flow_run_id).count("Crashed") == 1
    assert_exactly_once(tmp_path, folder.name, episodes=EPISODES)


def test_a_run_that_cannot_even_start_is_given_up_and_others_are_not_touched(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    with process_worker(tmp_path / "worker.log"):
        ours = client.create_flow_run_from_deployment(deploy_toy(client, "missing")).id
        other = client.create_flow_run_from_deployment(deploy_toy(client, "missing", tags=())).id
        failed = wait_for("giving up", lambda: in_state(client, ours, "FAILED"), timeout_s=150)
        time.sleep(DELAYS.restart_s + 5)
    assert failed.state is not None
    assert "crashed 2 times within an hour" in (failed.state.message or "")
    assert history(client, ours).count("AwaitingRetry") == 1
    assert history(client, ours)[-1] == "Failed"
    assert history(client, other)[-1] == "Crashed"
