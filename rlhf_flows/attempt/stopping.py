"""How an attempt is stopped from outside: what it notices, why it ends, what Prefect is told.

A worker tells a flow process by a signal that it should go, and the flow sees a cancelled task,
whatever the reason was. Suspension it would see at the end of the phase, a newer attempt at the
next call of a worker, and a cancellation without a worker not at all. The decision here: the flow
run itself is asked, every few seconds, and on the way out; its state says why, and the store says
whether it is still this attempt's to speak for: a newer one of the same flow run speaks for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import NoReturn
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Abort, ObjectNotFound, Pause, TerminationSignal
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from rlhf_flows.errors import (
    FencedError,
    GuardRailError,
    RunCancelledError,
    StoreUnavailableError,
    UserError,
)
from rlhf_flows.store import (
    ObjectStore,
    Outcome,
    RunLayout,
    check_fence,
    newest_attempt,
    read_json,
)

__all__ = ["FlowRunWatch", "started_for", "without_abort"]

_EVERY_S = 3.0
_WORKER_TAKES_S = 6.0
"""Within which a worker that is there has passed a cancellation on."""
_ANSWER_S = 5.0
_AWAY = (httpx.HTTPError, ObjectNotFound, TimeoutError, StoreUnavailableError)


class FlowRunWatch:
    """What an attempt knows of its flow run: that it was stopped, and in the end, why."""

    def __init__(self, flow_run: FlowRun, *, store: ObjectStore, run: str, attempt: int) -> None:
        self._flow_run = flow_run
        self._store, self._run, self._attempt = store, run, attempt
        self._cancelled_at = float("inf")
        self._found: BaseException | None = None
        """Why the watch ended what runs beside it, which itself only sees that it is cancelled."""
        self._outcome: Outcome | None = None

    async def watch(self) -> NoReturn:
        """Ends soon after the flow run was stopped.

        Raises:
            Pause: it was suspended.
            RunCancelledError: it was cancelled, and no worker is there to say so.
            FencedError: the run has a newer attempt.
        """
        while True:
            # A server or a store that is away stops nobody.
            with contextlib.suppress(*_AWAY):
                async with get_client() as client:
                    while True:
                        await asyncio.sleep(_EVERY_S)
                        await self._look_at(await client.read_flow_run(self._flow_run.id))

    async def _look_at(self, flow_run: FlowRun) -> None:
        try:
            if _state_id(flow_run) != _state_id(self._flow_run):
                # Retried, resumed or set by hand: maybe another process has it by now. Its run
                # count would not tell, as Resume leaves it alone.
                await asyncio.to_thread(check_fence, self._store, self._run, self._attempt)
            if flow_run.state is not None and _is_suspended(flow_run.state):
                raise Pause(state=flow_run.state)
            if flow_run.state is not None and _is_cancelled(flow_run.state):
                now = time.monotonic()
                self._cancelled_at = min(self._cancelled_at, now)
                has_worker = flow_run.deployment_id is not None
                if now - self._cancelled_at >= (_WORKER_TAKES_S if has_worker else 0):
                    raise RunCancelledError(f"flow run {flow_run.name!r} was cancelled")
        except (FencedError, Pause, RunCancelledError) as e:
            self._found = e
            raise

    # ---- on the way out -------------------------------------------------------------------

    async def outcome_of(self, error: BaseException) -> Outcome:
        """Why the attempt ends, by what it ended with.

        The first answer stands: what becomes of the pools, and what is recorded, must agree.
        """
        if self._outcome is None:
            self._outcome = await self._reason(self._found or error)
        return self._outcome

    async def _reason(self, error: BaseException) -> Outcome:
        match error:
            case FencedError():
                return "fenced"
            case RunCancelledError():
                return "cancelled"
            case Pause():
                return "suspended"
            case asyncio.CancelledError() | TerminationSignal():
                return await self._why_interrupted()
            case _:
                return "failed"

    async def _why_interrupted(self) -> Outcome:
        # Ray's handler of SIGTERM, which comes before Prefect's, gives a process three seconds and
        # then aborts it: too few for a store that is far away, or to release pools.
        signal.alarm(0)
        if self._flow_run.deployment_id is None:
            return "cancelled"  # by Ctrl-C, or by a signal to the process of a script
        flow_run = await self._ask()
        state = None if flow_run is None else flow_run.state
        if state is not None and _is_cancelled(state):
            return "cancelled"
        if state is not None and _is_suspended(state):
            return "suspended"
        return "terminated"

    async def keeps_pools(self, error: BaseException, *, on_cancel: bool) -> bool:
        """Whether a next attempt should find the pools loaded.

        Not after a user's mistake, nor where a guard rail stopped the run: waiting with loaded
        models until a person has looked helps nobody.
        """
        if await self.outcome_of(error) == "cancelled":
            return on_cancel
        return not isinstance(error, UserError | GuardRailError)

    async def tell(self, error: BaseException) -> NoReturn:
        """Raises what makes Prefect's engine say of this flow run what is so, or nothing.

        The engine sets a flow run to Failed for an exception and to nothing for an `Abort`: what
        it should do where a newer attempt speaks for the flow run, and where it is cancelled.
        """
        if not await self._is_mine(error):
            get_run_logger().error("%s", error)
            raise Abort(str(error)) from error
        if isinstance(error, RunCancelledError):
            with contextlib.suppress(*_AWAY):
                async with asyncio.timeout(_ANSWER_S), get_client() as client:
                    await client.set_flow_run_state(self._flow_run.id, Cancelled(), force=True)
            raise Abort(str(error)) from error
        raise error

    async def _is_mine(self, error: BaseException) -> bool:
        """Whether no newer attempt has this flow run. One that has another is none of its."""
        try:
            return not await asyncio.to_thread(self._is_replaced)
        except StoreUnavailableError:
            return not isinstance(error, FencedError)

    def _is_replaced(self) -> bool:
        newer = range(self._attempt + 1, newest_attempt(self._store, self._run) + 1)
        records = (read_json(self._store, RunLayout(self._run).attempt(n)) for n in newer)
        return any(record["flow_run_id"] == str(self._flow_run.id) for record in records)

    async def _ask(self) -> FlowRun | None:
        try:
            async with asyncio.timeout(_ANSWER_S), get_client() as client:
                return await client.read_flow_run(self._flow_run.id)
        except _AWAY:
            return None


async def started_for(flow_run: FlowRun) -> FlowRun:
    """The flow run that a worker started this process for, where this one is a subflow of it.

    It is the one that has a deployment, that is cancelled, suspended and retried.
    """
    started = os.environ.get("PREFECT__FLOW_RUN_ID")
    if started is None or flow_run.parent_task_run_id is None:
        return flow_run
    async with get_client() as client:
        return await client.read_flow_run(UUID(started))


def _state_id(flow_run: FlowRun) -> UUID | None:
    return None if flow_run.state is None else flow_run.state.id


def _is_suspended(state: State) -> bool:
    # A flow run that is paused in place waits in its process, which is another matter.
    return state.is_paused() and bool(state.state_details.pause_reschedule)


def _is_cancelled(state: State) -> bool:
    return state.is_cancelling() or state.is_cancelled()


@contextlib.contextmanager
def without_abort() -> Iterator[None]:
    """Around a flow of one's own: raises the error that an `Abort` was made of."""
    try:
        yield
    except Abort as e:
        if isinstance(e.__cause__, FencedError | RunCancelledError):
            raise e.__cause__ from None
        raise
