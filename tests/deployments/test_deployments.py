"""The deployments of prefect.yaml on a real server with a real worker: run, kill, retry, look.

One run tells it all, because starting a worker and a flow process costs most of the time.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.states import AwaitingRetry

from examples.reviews.data import make
from tests.deployments.worker import (
    POOL,
    ROOT,
    existing,
    in_state,
    prefect,
    process_worker,
    wait_for,
    wait_for_worker,
)

SETTINGS: dict[str, Any] = {
    "runtime": {
        "num_episode": 4,
        "sample_per_episode": 64,
        "train_global_batch_size": 64,
        "eval_episode_interval": 2,
    },
    "warmup_steps": 4,
    "warmup_batch_size": 32,
    "num_eval_prompts": 8,
    "sampler": "transformers",
}


@pytest.fixture
def worker(client: SyncPrefectClient, tmp_path: Path) -> Iterator[None]:
    """A process worker on the deployments of prefect.yaml."""
    prefect("deploy", "--all")
    with process_worker(tmp_path / "worker.log"):
        yield


def test_every_deployment_loads_its_flow_and_belongs_to_the_work_pool() -> None:
    from prefect.flows import load_flow_from_entrypoint

    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
    names = [
        f"{load_flow_from_entrypoint(d['entrypoint'], use_placeholder_flow=False).name}/{d['name']}"
        for d in deployments
    ]
    assert names == [
        "grpo/quickstart", "grpo/train", "sft/train", "reward_model/train", "ppo/train",
        "dpo/train", "online_dpo/train", "evaluate/run", "generate/run",
    ]  # fmt: skip
    assert {d["work_pool"]["name"] for d in deployments} == {POOL}


@pytest.mark.slow  # server, worker, two flow processes and four actors start: a minute and more
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("worker")
def test_a_killed_deployment_run_resumes_on_retry_and_shows_itself(
    client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    store = tmp_path / "runs"
    config = {**SETTINGS, "store": {"url": str(store)}, "cluster": {"address": ray_head}}
    deployment = client.read_deployment_by_name("grpo/quickstart")
    flow_run = client.create_flow_run_from_deployment(deployment.id, parameters={"config": config})
    folder = store / f"quickstart-{flow_run.id}"

    # The flow process dies of -9 once the first episode is trained.
    wait_for("training", lambda: existing(folder / "episodes/episode=000000/trained.json"))
    attempt = json.loads((folder / "attempts/000001.json").read_text("utf-8"))
    os.kill(attempt["pid"], signal.SIGKILL)
    wait_for("the crash", lambda: in_state(client, flow_run.id, "CRASHED"))
    trained = {p: p.read_bytes() for p in folder.glob("episodes/*/trained.json")}
    assert 1 <= len(trained) < SETTINGS["runtime"]["num_episode"]

    # Retry, as the button of the UI does it: the same flow run, the same run.
    wait_for_worker(client, flow_run.id)
    client.set_flow_run_state(flow_run.id, AwaitingRetry(), force=True)
    done = wait_for("the end", lambda: in_state(client, flow_run.id, "COMPLETED", "FAILED"))
    assert done.state is not None
    assert done.state.is_completed(), done.state.message
    assert {p.name for p in (folder / "attempts").glob("00000?.json")} == {
        "000001.json",
        "000002.json",
    }
    assert len(list(folder.glob("episodes/*/trained.json"))) == 4
    assert all(path.read_bytes() == before for path, before in trained.items())

    _check_artifacts(client, flow_run.id, folder)
    _check_page(client, flow_run.id)


def _check_page(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """What was under way when the process died is not shown as if it still were."""
    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    names = Counter(t.state_name for t in client.read_task_runs(flow_run_filter=only))
    assert set(names) == {"Completed", "Crashed"}
    assert 1 <= names["Crashed"] <= 3


def _check_artifacts(client: SyncPrefectClient, flow_run_id: UUID, folder: Path) -> None:
    """Made once per flow run, retried or not."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    )
    by_key: dict[str, Any] = {a.key or "": a for a in found}
    assert len(by_key) == len(found)
    assert {k for k in by_key if k.startswith("grpo-")} == {
        "grpo-now",
        "grpo-progress",
        "grpo-curves",
        "grpo-flows",
        "grpo-episodes",
        "grpo-samples",
        "grpo-side-by-side",
    }
    assert by_key["grpo-progress"].data == 100
    assert folder.name in by_key["grpo-progress"].description
    episodes = json.loads(by_key["grpo-episodes"].data)
    assert [row["episode"] for row in episodes] == [3, 2, 1, 0]
    assert all(0 <= row["reward"] <= 1 and 0 <= row["exact"] <= 1 for row in episodes)
    samples = json.loads(by_key["grpo-samples"].data)
    assert all(row["prompt"].endswith(">") for row in samples)
    for picture in ("grpo-curves", "grpo-flows"):
        assert "data:image/svg+xml;base64," in by_key[picture].data
    assert by_key["sft-progress"].data == 100


@pytest.mark.long  # five flow processes, one after the other: three minutes and more
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("worker")
def test_a_pipeline_of_deployment_runs_each_taking_what_the_one_before_trained(
    client: SyncPrefectClient, ray_head: str, tmp_path: Path
) -> None:
    data = make(tmp_path / "reviews")
    steps = {"num_episode": 1, "sample_per_episode": 32, "train_global_batch_size": 32}
    common = {
        "store": {"url": str(tmp_path / "runs")},
        "cluster": {"address": ray_head},
        "runtime": steps,
    }
    pairs = {"dataset": str(data / "preferences.jsonl")}
    sampled: dict[str, Any] = {
        "prompts": str(data / "prompts.jsonl"),
        "sampler": "transformers",
        "generation": {"max_new_tokens": 8},
    }
    stages: list[tuple[str, str, dict[str, Any]]] = [
        ("sft/train", "a", {"model": str(data / "model"),
                            "dataset": str(data / "demonstrations.jsonl")}),
        ("reward_model/train", "b", {"model": "run:a", **pairs}),
        ("ppo/train", "c", {"model": "run:a@1", "reward": {"model": "run:b"}, **sampled}),
        ("dpo/train", "d", {"model": "run:a", **pairs}),
        ("generate/run", "e", {"model": "run:c/ppo_policy", **sampled,
                               "prompts": str(data / "held_out_prompts.jsonl"), "runtime": {}}),
    ]  # fmt: skip
    for name, run_name, config in stages:
        deployment = client.read_deployment_by_name(name)
        flow_run = client.create_flow_run_from_deployment(
            deployment.id, parameters={"config": {**common, **config, "run_name": run_name}}
        )
        done = wait_for(name, lambda run=flow_run: in_state(client, run.id, "COMPLETED", "FAILED"))  # type: ignore[misc]
        assert done.state is not None
        assert done.state.is_completed(), f"{name}: {done.state.message}"
    assert len(list((tmp_path / "runs/e/evaluations").rglob("*.parquet"))) == 1
