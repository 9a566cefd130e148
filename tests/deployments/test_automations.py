"""The automations on a server that runs them: killed flow runs go on without a person."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event
from prefect.states import Suspended

from rlhf_flows.services.automations import TAG, install, installed, remove
from rlhf_flows.services.delays import Delays
from rlhf_flows.services.heartbeat import HEARTBEAT
from tests.deployments.worker import (
    attempt,
    deploy_toy,
    existing,
    history,
    in_state,
    kill_group,
    outcome,
    process_worker,
    wait_for,
)
from tests.end_to_end.processes import pids
from tests.end_to_end.whole_run import RUNTIME, assert_exactly_once

# Delays are the point.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPISODES = 3
DELAYS = Delays(restart_s=15, heartbeat_s=60, crashes_per_hour=2)


@pytest.fixture(autouse=True)
def automations(client: SyncPrefectClient) -> None:
    install(client, DELAYS)


def start_toy(client: SyncPrefectClient, store: Path, address: str, *, slow_s: float = 0.5) -> UUID:
    parameters: dict[str, Any] = {
        "store": str(store),
        "cluster": {"address": address},
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


@pytest.mark.long  # heartbeats are missed for as long as they may be
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


@pytest.mark.long
def test_a_suspended_run_waits_for_a_person_whatever_heartbeats_its_process_gave_until_it_ended(
    client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    with process_worker(tmp_path / "worker.log"):
        flow_run_id = start_toy(client, tmp_path, ray_head, slow_s=2.0)
        folder = wait_for_work(tmp_path, flow_run_id)
        client.set_flow_run_state(flow_run_id, Suspended(timeout_seconds=600))
        for name in ("prefect.flow-run.heartbeat", HEARTBEAT):
            emit_event(
                name,
                resource={"prefect.resource.id": f"prefect.flow-run.{flow_run_id}"},
                related=[
                    {
                        "prefect.resource.id": f"prefect.tag.{TAG}",
                        "prefect.resource.role": "tag",
                    }
                ],
            )
        wait_for("the end of the process", lambda: outcome(folder, 1), timeout_s=30)
        time.sleep(DELAYS.heartbeat_s + DELAYS.restart_s + 20)
        assert history(client, flow_run_id)[-1] == "Suspended"
        assert outcome(folder, 1) == "suspended"
        client.resume_flow_run(flow_run_id)
        wait_for("the end", lambda: in_state(client, flow_run_id, "COMPLETED"), timeout_s=120)
    assert "Crashed" not in history(client, flow_run_id)
    assert_exactly_once(tmp_path, folder.name, episodes=EPISODES)


@pytest.mark.long
def test_a_run_that_cannot_even_start_is_given_up_and_others_are_not_touched(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    with process_worker(tmp_path / "worker.log"):
        ours = client.create_flow_run_from_deployment(deploy_toy(client, "missing")).id
        other = client.create_flow_run_from_deployment(deploy_toy(client, "missing", tags=())).id
        failed = wait_for("giving up", lambda: in_state(client, ours, "FAILED"), timeout_s=300)
        time.sleep(DELAYS.restart_s + 5)
    assert failed.state is not None
    assert "crashed 2 times within an hour" in (failed.state.message or "")
    # A crash that a worker reports twice may schedule the same restart twice.
    assert [name for name, _ in groupby(history(client, ours))].count("AwaitingRetry") == 1
    assert history(client, ours)[-1] == "Failed"
    assert history(client, other)[-1] == "Crashed"


def test_installing_again_changes_what_differs_and_removing_leaves_none(
    client: SyncPrefectClient,
) -> None:
    before = installed(client)
    names = [a.name for a in before]
    assert names == ["rlhf-flows: give up", "rlhf-flows: heartbeat", "rlhf-flows: restart"]
    install(client, DELAYS)
    assert [a.id for a in installed(client)] == [a.id for a in before]
    install(client, replace(DELAYS, restart_s=16))
    now = installed(client)
    assert [a.id == b.id for a, b in zip(before, now, strict=True)] == [True, True, False]
    assert now[2].trigger.within == timedelta(seconds=16)
    assert sorted(remove(client)) == names
    assert installed(client) == []
