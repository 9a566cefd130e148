"""What an attempt says on its way out: to who asks for its pools, to the store, to Prefect."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from rlhf_flows.attempt.stopping import FlowRunWatch
from rlhf_flows.errors import FencedError, NoAnswerError, RunCancelledError
from rlhf_flows.store import ObjectStore, open_store, take_attempt


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deployed(client: SyncPrefectClient) -> FlowRun:
    """A flow run of a deployment that nobody works on."""
    flow_id = client.create_flow_from_name("toy")
    return client.create_flow_run_from_deployment(client.create_deployment(flow_id, name="toy"))


@pytest.fixture
def of_a_script(client: SyncPrefectClient) -> FlowRun:
    @flow
    def toy() -> None: ...

    return client.create_flow_run(toy)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/api"


def watch_of(flow_run: FlowRun, store: ObjectStore) -> FlowRunWatch:
    attempt = take_attempt(store, "r", flow_run_id=str(flow_run.id), changed={})
    return FlowRunWatch(flow_run, store=store, run="r", attempt=attempt.number)


async def test_pools_and_record_hear_the_same_reason_though_the_server_comes_back_between(
    deployed: FlowRun, client: SyncPrefectClient, store: ObjectStore, silent: str
) -> None:
    watch, error = watch_of(deployed, store), asyncio.CancelledError()
    client.set_flow_run_state(deployed.id, Cancelling(), force=True)
    with temporary_settings({PREFECT_API_URL: silent}):
        assert await watch.keeps_pools(error, on_cancel=False)
    assert await watch.outcome_of(error) == "terminated"


async def test_a_cancelled_run_that_the_server_tells_of_keeps_its_pools_only_where_asked_for(
    deployed: FlowRun, client: SyncPrefectClient, store: ObjectStore
) -> None:
    watch, error = watch_of(deployed, store), asyncio.CancelledError()
    client.set_flow_run_state(deployed.id, Cancelling(), force=True)
    assert not await watch.keeps_pools(error, on_cancel=False)
    assert await watch.keeps_pools(error, on_cancel=True)
    assert await watch.outcome_of(error) == "cancelled"


async def test_a_script_that_is_told_to_leave_has_the_time_to_say_how_it_ended(
    of_a_script: FlowRun, store: ObjectStore
) -> None:
    signal.alarm(60)  # as Ray does it, with three seconds
    try:
        assert await watch_of(of_a_script, store).outcome_of(asyncio.CancelledError()) == (
            "cancelled"
        )
    finally:
        left_s = signal.alarm(0)
    assert left_s == 0


async def test_a_server_that_never_answers_does_not_keep_a_cancelled_attempt(
    of_a_script: FlowRun, store: ObjectStore, silent: str
) -> None:
    began = time.monotonic()
    with temporary_settings({PREFECT_API_URL: silent}), pytest.raises(Abort):
        await watch_of(of_a_script, store).tell(RunCancelledError("cancelled"))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("error", [FencedError("fenced"), NoAnswerError("slept too long")])
async def test_an_attempt_whose_flow_run_has_a_newer_one_leaves_its_state_alone(
    error: Exception, deployed: FlowRun, store: ObjectStore
) -> None:
    watch = watch_of(deployed, store)
    take_attempt(store, "r", flow_run_id=str(deployed.id), changed={})
    take_attempt(store, "r", flow_run_id="another", changed={}, takeover=True)
    with disable_run_logger(), pytest.raises(Abort):
        await watch.tell(error)


async def test_an_attempt_that_another_flow_run_replaced_fails_its_own(
    deployed: FlowRun, store: ObjectStore
) -> None:
    watch = watch_of(deployed, store)
    take_attempt(store, "r", flow_run_id="another", changed={}, takeover=True)
    with pytest.raises(FencedError):
        await watch.tell(FencedError("fenced"))
