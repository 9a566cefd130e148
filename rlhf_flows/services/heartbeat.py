"""Signs of life of a flow run that learns, for the automations that look for missing ones.

Prefect's own heartbeat does not serve: by default it comes every three minutes, and it goes on
after a flow run was suspended, until its process ends, so that the silence of a process that was
asked to go looks like a crash. The decision here: events of our own, and a last one that says that
no more of them are to be expected.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NoReturn

from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.events.related import tags_as_related_resources
from prefect.exceptions import Abort, TerminationSignal

from rlhf_flows.together import beside

__all__ = ["EVERY_S", "HEARTBEAT", "LEFT", "heartbeats"]

EVERY_S = 30.0
HEARTBEAT = "rlhf-flows.flow-run.heartbeat"
LEFT = "rlhf-flows.flow-run.left"


@contextlib.asynccontextmanager
async def heartbeats(flow_run: FlowRun) -> AsyncIterator[None]:
    """Within it the flow run's silence is a crash; after it, nothing is known of the flow run."""
    try:
        async with beside(_beat(flow_run)):
            yield
    except (asyncio.CancelledError, TerminationSignal, Abort):
        # Ended from outside. Whoever did it says so to the server, or is gone, too: then silence is
        # the only sign. And a flow run that a newer attempt has is not for this one to speak for.
        raise
    except BaseException:  # whatever it was: no more signs of life are to be expected
        _emit(LEFT, flow_run)
        raise
    _emit(LEFT, flow_run)


async def _beat(flow_run: FlowRun) -> NoReturn:
    while True:
        _emit(HEARTBEAT, flow_run)
        await asyncio.sleep(EVERY_S)


def _emit(event: str, flow_run: FlowRun) -> None:
    emit_event(
        event,
        resource={
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.name": flow_run.name or "",
        },
        related=tags_as_related_resources(flow_run.tags or ()),
    )
