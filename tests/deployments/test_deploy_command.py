"""`rlhf-flows deploy` on a real server: what is there after it, after it again, who runs first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from typer.testing import CliRunner

from rlhf_flows.blocks import RunDefaults
from rlhf_flows.cli import app
from rlhf_flows.deployments.deployed import OWN_DEPLOYMENTS
from rlhf_flows.errors import ConfigError
from rlhf_flows.services.automations import installed
from rlhf_flows.services.scheduling import SLUG
from tests.deployments.worker import in_state, process_worker, wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # a server starts, and flow processes

GPUS = "gpus"
SHORT = ("--work-pool", GPUS, "--import", "tests.deployments.short_flow", "--only", "short")


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def deploy(*words: str) -> dict[tuple[str, str], str]:
    """Outcome by kind and name."""
    changes = json.loads(invoke("deploy", "--json", *words))["changes"]
    return {(c["kind"], c["name"]): c["outcome"] for c in changes}


def names(client: SyncPrefectClient) -> set[str]:
    return {d.name for d in client.read_deployments()}


def test_wrong_input_and_a_dry_run_change_nothing(client: SyncPrefectClient) -> None:
    wrong = {
        ("--only", "grop"): "no deployment 'grop'",
        ("--only", "sft", "--schedule", "grpo/train=0 3 * * *"): "is not deployed here",
        ("--schedule", "sft/train=at night"): "no cron expression",
        ("--defaults", "nobody"): "no block 'RLHF Run Defaults'",
        ("--import", "my_recipes"): "no module 'my_recipes'",
        ("--queue", "urgent"): "none of high, default, low",
        ("--job-variable", "image"): "KEY=VALUE",
    }
    for words, says in wrong.items():
        with pytest.raises(ConfigError, match=says):
            deploy("--work-pool", "nowhere", *words)
    planned = deploy("--work-pool", "nowhere", "--dry-run")
    assert {
        n for (kind, n), o in planned.items() if o != "created" and kind != "block type"
    } == set()
    assert names(client) == set()
    assert installed(client) == []
    with pytest.raises(ObjectNotFound):
        client.read_work_pool("nowhere")


def test_a_second_call_finds_nothing_to_do(client: SyncPrefectClient) -> None:
    words = ("--work-pool", GPUS, "--schedule", "grpo/quickstart=0 3 * * *")
    # A server may have it already: it registers what the entry points of its installation name.
    known = client.read_block_types()
    for block_type in known:
        if block_type.slug == RunDefaults.get_block_type_slug():
            client.delete_block_type(block_type.id)
    first = deploy(*words)
    assert first["block type", "RLHF Run Defaults"] == "created"
    assert {first[key] for key in first if key[0] in ("work pool", "deployment")} == {"created"}
    assert {n for kind, n in first if kind == "deployment"} == {
        d.full_name for d in OWN_DEPLOYMENTS
    }
    pool = client.read_work_pool(GPUS)
    assert (pool.type, pool.concurrency_limit) == ("process", 1)
    queues = {q.name: q.priority for q in client.read_work_queues(GPUS)}
    assert queues["high"] < queues["default"] < queues["low"]
    quickstart = client.read_deployment_by_name("grpo/quickstart")
    assert (quickstart.work_pool_name, quickstart.work_queue_name) == (GPUS, "default")
    (schedule,) = quickstart.schedules
    assert isinstance(schedule.schedule, CronSchedule)
    assert (schedule.slug, schedule.schedule.cron, schedule.active) == (SLUG, "0 3 * * *", True)
    assert installed(client)

    assert set(deploy(*words).values()) == {"unchanged"}
    assert client.read_deployment_by_name("grpo/quickstart").updated == quickstart.updated
    assert "nothing to do" in invoke("deploy", *words)


def test_what_a_person_added_stays_when_something_is_updated(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    deploy(*SHORT, "--schedule", "short/train=0 3 * * *")
    before = client.read_deployment_by_name("short/train")
    noon = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 12 * * *"), slug="noon")
    client.create_deployment_schedules(before.id, [noon])
    mine = DeploymentUpdate(
        tags=[*before.tags, "mine"],
        parameters={"seconds": 3},
        job_variables={
            **before.job_variables,
            "env": {**before.job_variables["env"], "MINE": "1"},
            "stream_output": False,
        },
    )
    client.update_deployment(before.id, mine)
    assert set(deploy(*SHORT).values()) == {"unchanged"}

    RunDefaults(settings={"log_level": "INFO"}).save("team", overwrite=True)
    changed = deploy(*SHORT, "--directory", str(tmp_path), "--defaults", "team", "--limit", "2")
    assert changed["deployment", "short/train"] == "updated"
    assert changed["work pool", GPUS] == "updated"
    assert sum(outcome == "updated" for outcome in changed.values()) == 2
    after = client.read_deployment_by_name("short/train")
    assert after.parameters == {"seconds": 3, "defaults": "team"}
    assert set(after.tags) == {"rlhf-flows", "mine"}
    assert after.job_variables["env"]["MINE"] == "1"
    assert after.job_variables["stream_output"] is False
    assert after.pull_steps is not None
    assert str(tmp_path) in json.dumps(after.pull_steps)
    assert after.job_variables["working_dir"] == str(tmp_path)
    assert {s.slug for s in after.schedules} == {SLUG, "noon"}
    assert client.read_work_pool(GPUS).concurrency_limit == 2

    gone = deploy(*SHORT, "--directory", str(tmp_path), "--schedule", "short/train=none")
    assert gone["schedule", "short/train"] == "removed"
    left = client.read_deployment_by_name("short/train").schedules
    assert {s.slug for s in left} == {"noon"}


def test_runs_of_one_pool_wait_for_each_other_and_the_high_queue_goes_first(
    client: SyncPrefectClient, tmp_path: Path
) -> None:
    deploy(*SHORT, "--limit", "1", "--directory", str(tmp_path), "--schedule", "short/train=none")
    deployment = client.read_deployment_by_name("short/train")
    submitted = {
        queue: client.create_flow_run_from_deployment(
            deployment.id, parameters={"seconds": 0.5}, work_queue_name=queue
        ).id
        for queue in ("low", "default", "high")
    }
    done: dict[str, Any] = {}
    with process_worker(tmp_path / "worker.log", GPUS):
        for queue in ("high", "default", "low"):
            done[queue] = wait_for(
                f"the run of {queue}",
                lambda queue=queue: in_state(  # type: ignore[misc]
                    client, submitted[queue], "COMPLETED", "FAILED", "CRASHED"
                ),
            )
    assert {run.state_name for run in done.values()} == {"Completed"}
    assert done["high"].end_time <= done["default"].start_time
    assert done["default"].end_time <= done["low"].start_time


def test_blocks_are_listed_and_checked_by_name(client: SyncPrefectClient, tmp_path: Path) -> None:
    from rlhf_flows.blocks import EpisodeStore

    EpisodeStore(url=str(tmp_path / "runs")).save("shelf", overwrite=True)
    assert "rlhf-episode-store/shelf" in invoke("blocks", "ls")
    assert "rlhf-episode-store/shelf works" in invoke("blocks", "check", "shelf")
    with pytest.raises(ConfigError, match="no block is called 'cellar'"):
        invoke("blocks", "check", "cellar")
