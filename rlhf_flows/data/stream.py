"""The shards of one phase of one episode, as they come: what flows between phases.

The decision here: a stream holds handles, not samples. A handle names a committed object and, while
it lives, a reference to the batch in memory; so a stream costs nothing in the flow process, and one
rebuilt from the store is the same stream. It belongs to one event loop, and no wait is unnamed:
every message says which shards of what it waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_flows.errors import DataError, WaitTimeoutError

__all__ = ["ShardHandle", "StreamDataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHandle:
    index: int
    key: str
    """Key of the committed Parquet object."""
    rows: int | None = None
    """Number of samples; None where only the listing of the store is known."""
    ref: Any = None
    """The batch in memory, if somebody holds it (a Ray ObjectRef); the store is the truth."""


class StreamDataset:
    """`num_shards` shards that arrive in any order, each once."""

    def __init__(self, num_shards: int, *, name: str = "stream") -> None:
        """`name` (such as "rollout of episode 3") stands in messages."""
        self.num_shards = num_shards
        self.name = name
        self._arrived: list[ShardHandle] = []
        self._by_index: dict[int, ShardHandle] = {}
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def append(self, handle: ShardHandle) -> bool:
        """Add a shard. False, and nothing changes, if its index is there already.

        Raises DataError for an index beyond the stream, or one that names another object.
        """
        if not 0 <= handle.index < self.num_shards:
            raise DataError(
                f"{self.name}: shard {handle.index} ({handle.key}) was appended, but the plan has "
                f"shards 0 to {self.num_shards - 1}: it belongs to another plan"
            )
        known = self._by_index.get(handle.index)
        if known is not None:
            if known.key != handle.key:
                raise DataError(
                    f"{self.name}: shard {handle.index} is {known.key} already and came again as "
                    f"{handle.key}: two objects claim one shard; read the store again to see "
                    "which one counts"
                )
            return False
        self._by_index[handle.index] = handle
        self._arrived.append(handle)
        self._wake()
        return True

    def replace(self, handle: ShardHandle) -> None:
        """Another object for a shard that has arrived: the one it had is damaged."""
        self._arrived[self._arrived.index(self[handle.index])] = handle
        self._by_index[handle.index] = handle

    def fail(self, cause: BaseException) -> None:
        """No more shards will come: whoever waits gets `cause`. The first cause stands."""
        if self._failure is None:
            self._failure = cause
            self._wake()

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices that have not arrived."""
        return tuple(i for i in range(self.num_shards) if i not in self._by_index)

    @property
    def num_arrived(self) -> int:
        return len(self._arrived)

    def __getitem__(self, index: int) -> ShardHandle:
        if index not in self._by_index:
            raise DataError(f"{self.name}: shard {index} has not arrived; wait_for([{index}]) does")
        return self._by_index[index]

    async def __aiter__(self) -> AsyncIterator[ShardHandle]:
        """Every shard in order of arrival, until all have come or the stream fails.

        Any number of readers may iterate, each from the first shard.
        """
        position = 0
        while position < self.num_shards:
            if position < len(self._arrived):
                yield self._arrived[position]
                position += 1
            elif self._failure is not None:
                raise self._failure
            else:
                await self._changed.wait()

    async def wait_for(self, indices: Iterable[int], *, timeout_s: float) -> list[ShardHandle]:
        """The shards `indices`, in that order, as soon as all have arrived.

        Raises what the stream failed with, or WaitTimeoutError naming the shards still missing.

        Args:
            timeout_s: For the next shard, whichever it is: counted anew whenever one arrives, for
                then the phase gets on with its work, however long that takes as a whole.
        """
        wanted = list(indices)
        for index in wanted:
            if not 0 <= index < self.num_shards:
                raise DataError(
                    f"{self.name}: shard {index} was asked for, "
                    f"the plan has shards 0 to {self.num_shards - 1}"
                )
        while missing := [i for i in wanted if i not in self._by_index]:
            if self._failure is not None:
                raise self._failure
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError as e:
                raise WaitTimeoutError(
                    f"{self.name}: shards {_listed(missing)} are waited for, and no shard came for"
                    f" {timeout_s:g} s; {len(self._arrived)} of {self.num_shards} have arrived"
                ) from e
        return [self._by_index[i] for i in wanted]

    def _wake(self) -> None:
        # A fresh event for the next change: readers that still hold the old one wake, and none
        # has to clear an event that another waits on.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _listed(found: Sequence[int], *, most: int = 10) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(str(i) for i in found[:most]) + more
