"""A run that is started again by Prefect's own retries, and one that died too often to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Crashed

from rlhf_flows.errors import AttemptsExhaustedError
from rlhf_flows.store import commit_json, open_store, read_json
from rlhf_flows.tasks import NoProgress
from tests.end_to_end.processes import generated, pids
from tests.end_to_end.whole_run import RUNTIME, assert_exactly_once, learn, toy_engine

pytestmark = pytest.mark.usefixtures("services")


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

    import asyncio

    asyncio.run(retried())
    store = open_store(str(tmp_path))
    outcomes = [read_json(store, f"r/attempts/00000{n}.ended.json")["outcome"] for n in (1, 2)]
    assert outcomes == ["failed", "completed"]
    assert len(pids(log)) == 1
    assert len(generated(log)) <= 3 * RUNTIME["sample_per_episode"] + 32
    assert_exactly_once(tmp_path, "r", episodes=3)


@pytest.fixture
def client() -> Any:
    with get_client(sync_client=True) as client:
        yield client


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
