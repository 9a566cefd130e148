"""What all phase tasks share: no cache, no stored results, and who is retried.

Only what may pass by itself is tried again (a dead replica, a store that was away). A user's
mistake and a fence are final at once.
"""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from rlhf_flows.errors import TransientError

__all__ = ["PHASE"]


async def _may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, TransientError)


PHASE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": 1,
    "retry_condition_fn": _may_pass,
}
"""Options of every phase task."""
