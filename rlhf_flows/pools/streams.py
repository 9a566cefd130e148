"""What the ranks of a replica yield, as one stream: Ray's generators, with an end to every wait.

Ray's own iteration waits for ever, fetches what it waits for, and knows of one rank alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayTaskError

from rlhf_flows.errors import NoAnswerError

__all__ = ["items_of"]

_END = object()


async def items_of(
    ranks: Sequence[Any], method: str, args: Sequence[Any], deadline: float, what: str
) -> AsyncGenerator[Any, None]:
    """What rank 0 yields in `method`, one item ahead of the caller; the others yield nothing.

    Items are fetched to this process: of what is large they hold references.

    Args:
        deadline: On the clock of `time.monotonic`, for all of it.

    Raises:
        NoAnswerError: the deadline has passed.
        Exception: what a rank raised, unwrapped from what Ray makes of it; what Ray raises where
            the process of a rank is gone.
    """
    streams = [
        getattr(rank, method)
        .options(num_returns="streaming", _generator_backpressure_num_objects=1)
        .remote(*args)
        for rank in ranks
    ]
    started = time.monotonic()
    others = [asyncio.ensure_future(_next(stream)) for stream in streams[1:]]
    first: asyncio.Future[Any] | None = None
    number = 0
    try:
        while True:
            number += 1
            first = asyncio.ensure_future(_next(streams[0]))
            if await _one_of(first, others, deadline) is _END:
                for other in others:  # they took part to the end
                    await _one_of(other, others, deadline)
                return
            yield first.result()
            first = None  # with the item, before the next one is asked for
    except RayTaskError as e:  # before TimeoutError, which it also is where a rank raised one
        cause = e.cause
        if isinstance(cause, Exception) and not isinstance(cause, RayTaskError):
            raise cause from e
        raise
    except TimeoutError as e:
        late = [i for i, f in enumerate([first, *others]) if f is not None and not f.done()]
        raise NoAnswerError(
            f"waited for {what} since {time.monotonic() - started:.1f} s, and for number {number}"
            f" of what it yields: {_ranks(late, len(ranks))} gave no answer"
        ) from e
    finally:
        # What was raised keeps this frame, and while its caller has a generator, it waits for it.
        streams.clear()
        for waiting in (first, *others):
            if waiting is not None:
                waiting.cancel()


async def _next(stream: Any) -> Any:
    try:
        reference = await anext(stream)
    except StopAsyncIteration:
        return _END
    return await reference


async def _one_of(
    wanted: asyncio.Future[Any], others: Sequence[asyncio.Future[Any]], deadline: float
) -> Any:
    """The wanted one's result; at once what another raises."""
    while not wanted.done():
        waited = {wanted, *(o for o in others if not o.done())}
        remaining_s = deadline - time.monotonic()
        done, _ = await asyncio.wait(
            waited, timeout=max(remaining_s, 0), return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise TimeoutError
        for other in done - {wanted}:
            other.result()
    return wanted.result()


def _ranks(late: Sequence[int], count: int) -> str:
    return "it" if count == 1 else f"rank {', '.join(map(str, late))} of {count}"
