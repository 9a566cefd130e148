"""Runs that Prefect retries by itself, that are cancelled without a worker, that died too often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Crashed

from rlhf_flows.errors import AttemptsExhaustedError, RunCancelledError
from rlhf_flows.store import commit_json, open_store, read_json
from rlhf_flows.tasks import NoProgress
from tests.end_to_end.processes import generated, pids
from tests.end_to_end.whole_run import RUNTIME, assert_exactly_once, learn, toy_engine

pytestmark = pytest.mark.usefixtures("services")


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


class FailsOnce(NoProgress):
    """An error of the flow process, that passes."""

    def __init__(self) -> None:
        self.left = 1

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        if (phase, number) == ("training", 0) and self.left:
            self.left -= 1
            raise OSError("no space left on device")


def test_a_flow_with_retries_goes_on_in_the_same_process_with_the_same_pools(
    tmp_path: Path, services: str
) -> None:
    log, progress = tmp_path / "calls", FailsOnce()

    @flow(retries=1, persist_result=False)
    async def retried() -> None:
        await toy_engine(log=log, eval_rows=0).alearn(
            run_name="r",
            store={"url": str(tmp_path)},
            cluster={"address": services},
            runtime=RUNTIME,
            progress=progress,
        )

    asyncio.run(retried())
    store = open_store(str(tmp_path))
    outcomes = [read_json(store, f"r/attempts/00000{n}.ended.json")["outcome"] for n in (1, 2)]
    assert outcomes == ["failed", "completed"]
    assert len(pids(log)) == 1
    assert len(generated(log)) <= 3 * RUNTIME["sample_per_episode"] + 32
    assert_exactly_once(tmp_path, "r", episodes=3)


class Warns(NoProgress):
    def started(self, phase: str, number: int, total: int) -> None:
        logging.getLogger("rlhf_flows.pools.pool").warning("%s waits for replica 0", phase)


@pytest.mark.slow
def test_what_a_run_warns_of_is_on_the_page_of_its_flow_run(
    tmp_path: Path, client: SyncPrefectClient
) -> None:
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: True}):
        engine = toy_engine(eval_rows=0)
        result = learn(engine, tmp_path, "warned", num_episode=1, progress=Warns())
    only = LogFilterFlowRunId(any_=[UUID(result.flow_run_id)])
    for _ in range(100):
        if logs := client.read_logs(LogFilter(flow_run_id=only)):
            break
        time.sleep(0.1)
    said = [log.message for log in logs if log.name.startswith("rlhf_flows")]
    assert "rollout waits for replica 0" in said
    assert not [h for h in logging.getLogger("rlhf_flows").handlers if h.level]


@pytest.mark.slow
def test_a_run_that_died_too_often_stays_failed_and_says_why_and_how_to_go_on(
    tmp_path: Path, client: SyncPrefectClient
) -> None:
    @flow
    def toy() -> None: ...

    killed = client.create_flow_run(toy, state=Crashed(message="exited with status code: -9."))
    learn(toy_engine(eval_rows=0), tmp_path, "r", num_episode=1)
    store = open_store(str(tmp_path))
    first = read_json(store, "r/attempts/000001.json")
    for number in (2, 3):
        record = {**first, "number": number, "flow_run_id": str(killed.id), "host": "node-7"}
        commit_json(store, f"r/attempts/00000{number}.json", record)

    with pytest.raises(AttemptsExhaustedError) as refused:
        learn(toy_engine(eval_rows=0), tmp_path, "r", num_episode=2, max_attempts=2)
    for word in (
        "last 2 attempts died",
        "runtime.max_attempts is 2",
        "attempt 3 on node-7",
        "exited with status code: -9",
        "run_name=r",
    ):
        assert word in str(refused.value)
    # No number was taken, so it says the same again; the way that it names leads on.
    assert not (tmp_path / "r/attempts/000004.json").exists()
    learn(toy_engine(eval_rows=0), tmp_path, "r", num_episode=2, max_attempts=7)
    assert_exactly_once(tmp_path, "r", episodes=2)
    # It has ended in good order, so what was before does not count any more.
    learn(toy_engine(eval_rows=0), tmp_path, "r", num_episode=3, max_attempts=1)


class CancelsItself(NoProgress):
    """Somebody presses Cancel in the UI after the first episode."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.flow_run_id: UUID

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        if (phase, number) == ("training", 0):
            context = FlowRunContext.get()
            assert context is not None
            assert context.flow_run is not None
            self.flow_run_id = context.flow_run.id
            self.client.set_flow_run_state(self.flow_run_id, State(type=StateType.CANCELLING))


@pytest.mark.slow
def test_a_run_of_a_script_is_cancelled_in_the_ui_and_goes_on_when_started_again(
    tmp_path: Path, client: SyncPrefectClient
) -> None:
    progress = CancelsItself(client)
    engine = toy_engine(eval_rows=0, slow_s=1.0)  # no worker is there to pass it on
    with pytest.raises(RunCancelledError, match="was cancelled"):
        learn(engine, tmp_path, "r", progress=progress, num_episode=6)
    assert client.read_flow_run(progress.flow_run_id).state_type == StateType.CANCELLED
    ended = read_json(open_store(str(tmp_path)), "r/attempts/000001.ended.json")
    assert ended["outcome"] == "cancelled"
    assert not (tmp_path / "r/episodes/episode=000005/trained.json").exists()
    learn(toy_engine(eval_rows=0, slow_s=0.0), tmp_path, "r", num_episode=6)
    assert_exactly_once(tmp_path, "r", episodes=6)
