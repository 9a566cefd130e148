"""What the ranks of a replica answer to one call, and what that comes to.

The decision here: the first failure does not decide alone. Whose sibling is gone fails as well, in
words that blame nobody or the user's code; so the others get a moment to answer, and what is named
is the cause: who took the run over, then a rank that is gone, then an error of its own, and at last
a rank that waited in vain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from rlhf_flows.errors import (
    FencedError,
    NoAnswerError,
    RankLostError,
    SiblingFailedError,
    TransientError,
)

__all__ = ["DEAD", "gather", "last_line"]

_SIBLINGS_S = 1.5
"""For the other ranks to answer when one has failed: longer than one takes to ask for a lost one
(modules/rank_group.py)."""
_DIED = (RayActorError, ActorDiedError, ActorUnavailableError, OutOfMemoryError)
DEAD = (*_DIED, RankLostError)
"""What is raised where the process of an actor is gone, or one that a sibling waits for."""


async def gather(
    answers: Sequence[Awaitable[Any]],
    timeout_s: float,
    waiting_for: str,
    *,
    ranks: Sequence[str] = (),
    on_torn: Callable[[], None] | None = None,
) -> list[Any]:
    """All answers, or the failure that explains the others, unwrapped from what Ray makes of it.

    Args:
        ranks: What to call each that answers, where they are the ranks of a replica.
        on_torn: Called before a failure is raised that leaves ranks apart: one is still at work, or
            failed where others did not, so that their next collectives would not be the same ones.

    Raises:
        NoAnswerError: not all answered in time.
        RankLostError: with several, one of them is gone or stuck; it is named.
    """
    waits = [asyncio.ensure_future(_answer(a)) for a in answers]
    if not waits:
        return []
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        deadline = time.monotonic() + _SIBLINGS_S
        while (failed := _failures(waits)) and not _is_told(failed.values()):
            pending, left_s = [w for w in waits if not w.done()], deadline - time.monotonic()
            if not pending or left_s <= 0:
                break
            await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        silent = [i for i, w in enumerate(waits) if not w.done()]
    finally:
        for wait in waits:
            wait.cancel()
    if failed:
        if on_torn is not None and _are_torn(failed, silent, len(waits)):
            on_torn()
        raise _cause(failed, ranks)
    if silent:
        who = f": no answer of {', '.join(ranks[i] for i in silent)}" if len(ranks) > 1 else ""
        raise NoAnswerError(f"waited {timeout_s:g} s for {waiting_for}{who}")
    return [w.result() for w in waits]


async def _answer(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except RayTaskError as e:
        cause = e.cause
        if isinstance(cause, Exception) and not isinstance(cause, RayTaskError):
            raise cause from e
        raise


def _failures(waits: Sequence[asyncio.Future[Any]]) -> dict[int, BaseException]:
    return {i: e for i, w in enumerate(waits) if w.done() and (e := w.exception())}


def _is_told(errors: Iterable[BaseException]) -> bool:
    """Whether a rank is gone, and another one has said what that one was in."""
    found = list(errors)
    return any(isinstance(e, _DIED) for e in found) and any(
        isinstance(e, RankLostError) for e in found
    )


def _cause(errors: dict[int, BaseException], ranks: Sequence[str]) -> BaseException:
    """The one that the others follow from."""
    fenced = [e for e in errors.values() if isinstance(e, FencedError)]
    if fenced:
        return fenced[0]
    died = {i: e for i, e in errors.items() if isinstance(e, _DIED)}
    lost = [e for e in errors.values() if isinstance(e, RankLostError)]
    own = [e for e in errors.values() if not isinstance(e, DEAD)]
    own.sort(key=lambda e: isinstance(e, SiblingFailedError))
    if died and len(ranks) > 1:
        what = "; ".join(f"{ranks[i]} died: {last_line(e).rstrip('.')}" for i, e in died.items())
        error = RankLostError(f"{what}. {lost[0]}" if lost else what)
        error.__cause__ = next(iter(died.values()))
        return error
    return next(iter([*died.values(), *own, *lost]))


def _are_torn(errors: dict[int, BaseException], silent: Sequence[int], num_ranks: int) -> bool:
    if num_ranks < 2 or any(isinstance(e, FencedError) for e in errors.values()):
        return False  # of whom a newer attempt took over, nothing is this one's to end
    if silent or any(isinstance(e, DEAD) for e in errors.values()):
        return True
    # A store that is away keeps one rank from its part, and no rank from a collective.
    if all(isinstance(e, TransientError) for e in errors.values()):
        return False
    kinds = {type(e) for e in errors.values()} - {SiblingFailedError}
    return len(errors) < num_ranks or len(kinds) > 1


def last_line(error: BaseException) -> str:
    """The last line of a message, without what Ray says of deaths in general."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
