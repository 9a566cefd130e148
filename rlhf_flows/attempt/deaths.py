"""How often a run may die: the limit that ends what would otherwise be a loop of crashes.

The decision here: the store counts, not Prefect. A crashed flow run is started again by an
automation, by a person or by a scheduler of the cluster, and all of them come through here.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from rlhf_flows.errors import AttemptsExhaustedError
from rlhf_flows.store import ObjectStore, RunLayout, deaths_in_a_row, read_json

__all__ = ["check_attempts_left"]


async def check_attempts_left(store: ObjectStore, run: str, *, max_attempts: int) -> None:
    """Raises AttemptsExhaustedError where the last `max_attempts` attempts have all died."""
    deaths = await asyncio.to_thread(deaths_in_a_row, store, run)
    if len(deaths) < max_attempts:
        return
    record = await asyncio.to_thread(read_json, store, RunLayout(run).attempt(deaths[0]))
    reason = await _last_reason(record["flow_run_id"])
    raise AttemptsExhaustedError(
        f"run {run!r} is not started again: its last {len(deaths)} attempts died, and"
        f" runtime.max_attempts is {max_attempts}. The last one, attempt {deaths[0]} on"
        f" {record['host']}, {f'ended with: {reason}' if reason else 'left no reason behind'}."
        " Find out why (memory running out, a node that is drained, the logs of the flow run and of"
        f" Ray), then go on with run_name={run} and runtime.max_attempts={len(deaths) + 5} or more"
    )


async def _last_reason(flow_run_id: str | None) -> str:
    """What Prefect knows of the last crash of a flow run; nothing where it cannot be asked."""
    if flow_run_id is None:
        return ""
    try:
        async with get_client() as client:
            states = await client.read_flow_run_states(UUID(flow_run_id))
    except (httpx.HTTPError, ObjectNotFound):
        return ""
    messages = [s.message for s in states if s.is_crashed() and s.message]
    return messages[-1].rstrip(".") if messages else ""
