"""What a flow run's page says beside artifacts: our warnings, and the end of dead task runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging.handlers import APILogHandler
from prefect.states import Crashed

__all__ = ["close_task_runs", "warnings_shown"]

logger = logging.getLogger(__name__)

_OURS = logging.getLogger("rlhf_flows")
_AT_ONCE = 200


@contextlib.asynccontextmanager
async def warnings_shown() -> AsyncIterator[None]:
    """Within it, warnings of this package are among the logs of the flow run: who waits for whom
    and since when, which replica died, which shard is made again."""
    if any(isinstance(handler, APILogHandler) for handler in _OURS.handlers):
        yield  # PREFECT_LOGGING_EXTRA_LOGGERS names us
        return
    handler = APILogHandler(level=logging.WARNING)
    _OURS.addHandler(handler)
    try:
        yield
    finally:
        _OURS.removeHandler(handler)


async def close_task_runs(flow_run: FlowRun) -> None:
    """Says of the task runs that an earlier process of a flow run left that they crashed with it.

    A process that is killed says nothing, and Prefect shows its tasks as running for good.
    """
    if flow_run.run_count < 2:
        return
    under_way = TaskRunFilter(
        state=TaskRunFilterState(
            type=TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]), name=None
        )
    )
    state: State[None] = Crashed(message="the process of its attempt died")
    try:
        async with get_client() as client:
            found = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])),
                task_run_filter=under_way,
                limit=_AT_ONCE,
            )
            for task_run in found:
                if task_run.flow_run_run_count < flow_run.run_count:
                    await client.set_task_run_state(task_run.id, state, force=True)
    except httpx.HTTPError as e:
        logger.info("task runs of an earlier attempt stay as they are: %s", e)
