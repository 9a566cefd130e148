"""Sweeps in queues of one pool: the queue of higher priority goes first, one run at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate

from rlhf_flows.deployments import find_recipe
from rlhf_flows.deployments.sweep import plan_sweep
from rlhf_flows.deployments.sweep_runs import submit
from rlhf_flows.errors import ConfigError
from tests.deployments.worker import POOL, deploy_toy, prefect, process_worker, wait_for


@pytest.mark.long  # a server, a worker and three flow processes, one after the other
@pytest.mark.timeout(600)
def test_what_waits_in_the_queue_of_higher_priority_goes_first(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))
    for queue, priority in (("high", "1"), ("low", "10")):
        prefect("work-queue", "create", queue, "--pool", POOL, "--priority", priority)
    deploy_toy(client, "line", tags=["plain"])
    words = [f"store.url={tmp_path}", "learning_rate=1e-4,3e-4"]
    recipe = find_recipe("quickstart")
    later = plan_sweep(recipe, words, name="later").points
    urgent = plan_sweep(recipe, words, name="urgent").points[:1]
    with pytest.raises(ConfigError, match=r"no queue 'hgh', it has default, high, low"):
        submit(client, "line/test plain", later, sweep="later", queue="hgh")
    with pytest.raises(ConfigError, match="no deployment 'line/none'"):
        submit(client, "line/none", later, sweep="later", queue="low")

    made = submit(client, "line/test plain", later, sweep="later", queue="low")
    assert list(made) == ["later-001", "later-002"]
    assert submit(client, "line/test plain", later, sweep="later", queue="low") == {}
    (flow_run_id,) = submit(
        client, "line/test plain", urgent, sweep="urgent", queue="high"
    ).values()
    assert set(client.read_flow_run(flow_run_id).tags) == {"plain", "sweep:urgent"}  # type: ignore[arg-type]

    with process_worker(tmp_path / "worker.log"):
        order = wait_for("all three", lambda: _said(tmp_path, 6))
    begun = [line.split()[0] for line in order[::2]]
    assert begun[0] == "urgent-001"
    assert sorted(begun[1:]) == ["later-001", "later-002"]
    # Each ended before the next one began.
    assert order == [f"{name} {what}" for name in begun for what in ("begins", "ends")]


def _said(folder: Path, count: int) -> list[str] | None:
    path = folder / "order"
    lines = path.read_text().splitlines() if path.exists() else []
    return lines if len(lines) == count else None
