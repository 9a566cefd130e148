"""The artifacts of a flow run: made once, updated to the end, and never in anybody's way."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import FlowRunContext
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from rlhf_flows.config import EngineConfig
from rlhf_flows.reporting.artifacts import ArtifactProgress, FanOut
from rlhf_flows.store import RunLayout, commit_json, open_store, scan
from rlhf_flows.tasks import NoProgress, Runtime

RUN = "a-run"


def a_runtime(folder: Path, *, num_episode: int = 2) -> Runtime:
    store = open_store(folder)
    return Runtime(
        config=EngineConfig.model_validate({"runtime": {"num_episode": num_episode}}),
        run=RUN,
        attempt=1,
        store=store,
        state=scan(store, RUN),
        pools={},
        environment=None,
        rollout_nodes=frozenset(),
        scoring_nodes=frozenset(),
        trainer=None,
        evaluator=None,
        syncs=(),
        dataset=None,
        eval_dataset=None,
    )


def artifacts_of(folder: Path, flow_run_id: str, *, num_episode: int = 2) -> ArtifactProgress:
    runtime = a_runtime(folder, num_episode=num_episode)
    phases = {"training": range(num_episode)}
    return ArtifactProgress(runtime, name="My Engine", phases=phases, flow_run_id=flow_run_id)


def train(progress: ArtifactProgress | FanOut, episode: int) -> None:
    progress.started("training", episode, 1)
    progress.advanced("training", episode, 1)
    progress.samples(episode, [{"prompt": "p", "completion": "c", "reward": 1.0}])
    progress.finished("training", episode, 0.5, {"reward": 0.5 + episode / 10, "loss": 1.0})


async def found(flow_run_id: UUID) -> dict[str, Any]:
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    async with get_client() as client:
        artifacts = await client.read_artifacts(artifact_filter=of_run)
    by_key = {a.key or "": a for a in artifacts}
    assert len(by_key) == len(artifacts)
    return by_key


@pytest.mark.usefixtures("prefect_server")
async def test_a_second_attempt_of_a_flow_run_updates_the_artifacts_of_the_first(
    tmp_path: Path,
) -> None:
    @flow(persist_result=False)
    async def attempts() -> UUID:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        flow_run_id = context.flow_run.id
        async with artifacts_of(tmp_path, str(flow_run_id)) as first:
            train(first, 0)
        assert (await found(flow_run_id))["my-engine-progress"].data == 50

        store = open_store(tmp_path)
        commit = {"metrics": {"reward": 0.5, "loss": 1.0}, "seconds": 0.5}
        commit_json(store, RunLayout(RUN).trained(0), commit)
        async with artifacts_of(tmp_path, str(flow_run_id)) as second:
            train(second, 1)
        return flow_run_id

    artifacts = await found(await attempts())
    assert set(artifacts) == {
        f"my-engine-{k}" for k in ("progress", "now", "curves", "episodes", "samples")
    }
    assert artifacts["my-engine-progress"].data == 100
    rows = json.loads(artifacts["my-engine-episodes"].data)
    assert [(row["episode"], row["reward"]) for row in rows] == [(1, 0.6), (0, 0.5)]
    for artifact in artifacts.values():
        assert RUN in artifact.description
        assert str(tmp_path) in artifact.description


async def test_an_api_that_is_away_is_a_warning_and_delays_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = {PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    caplog.set_level(logging.WARNING, logger="rlhf_flows")
    started = time.monotonic()
    with temporary_settings(away), disable_run_logger():
        async with artifacts_of(tmp_path, str(uuid4())) as artifacts:
            train(artifacts, 0)
    assert time.monotonic() - started < 8
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("rlhf_flows")]
    assert f"the artifacts of run {RUN} may be out of date: ConnectError" in warning


@pytest.mark.usefixtures("prefect_server")
async def test_an_error_inside_goes_through_and_the_last_state_is_shown(tmp_path: Path) -> None:
    flow_run_id = uuid4()

    async def fails() -> None:
        async with artifacts_of(tmp_path, str(flow_run_id)) as artifacts:
            train(artifacts, 0)
            raise KeyError("of the run")

    with disable_run_logger(), pytest.raises(KeyError, match="of the run"):
        await fails()
    assert (await found(flow_run_id))["my-engine-progress"].data == 50


def test_all_listeners_are_told() -> None:
    class Listener(NoProgress):
        def __init__(self) -> None:
            self.told: list[str] = []

        def started(self, phase: str, number: int, total: int) -> None:
            self.told.append(f"{phase} {number}")

    listeners = Listener(), Listener()
    progress = FanOut(*listeners)
    progress.begin(RUN, 2)
    train(progress, 1)
    assert [listener.told for listener in listeners] == [["training 1"]] * 2
