"""Coroutines that live and fail together. Knows asyncio alone.

The decision here: who catches an error should not have to know how many tasks were under way, so
the first failure is raised itself, with its own cause; where it has none, that is the group.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NoReturn

__all__ = ["beside", "together"]


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises its first failure itself, not a group of one."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        first = _first_leaf(failures)
        raise first from first.__cause__ or failures


@contextlib.asynccontextmanager
async def beside(watch: Coroutine[Any, Any, NoReturn]) -> AsyncIterator[None]:
    """Runs a coroutine that never returns for as long as the block; its error ends the block."""
    async with together() as group:
        watching = group.create_task(watch)
        yield
        watching.cancel()


def _first_leaf(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
