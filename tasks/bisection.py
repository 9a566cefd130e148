"""Which samples of a shard end or hang their worker: found by halves. Knows no store and no pool.

The decision here: nobody is blamed but a sample that failed twice alone. Whatever else ends a
worker (a kill from outside, memory that many samples need together) fails larger parts only, and
leaves the search without a culprit. Halves are whole groups first, then the samples of one group;
one culprit of a group is enough, since its group goes with it. And where two samples fail alone
before any part of the shard went through, it is not the samples.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf_flows.errors import PoolError

__all__ = ["Failure", "find_culprits"]


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a part of a shard ended its worker."""

    module: str
    cause: str


Attempt = Callable[[Sequence[str]], Awaitable[Failure | None]]
"""Runs some samples and throws away what comes of it; None where they went through."""


async def find_culprits(
    groups: Sequence[Sequence[str]], attempt: Attempt, *, where: str, most: int
) -> dict[str, Failure]:
    """The samples to blame for a shard that failed as a whole; none where no sample fails alone.

    Args:
        groups: Sample ids of the shard, by group.
        where: Names the shard in messages.
        most: Samples that are searched for; each costs several workers.

    Raises PoolError where every sample that was tried alone failed, and nothing went through.
    """
    search = _Search(attempt, where, most)
    await search.among_groups(groups)
    return search.found


class _Search:
    def __init__(self, attempt: Attempt, where: str, most: int) -> None:
        self.found: dict[str, Failure] = {}
        self._attempt = attempt
        self._where = where
        self._most = most
        self._something_went_through = False

    async def among_groups(self, groups: Sequence[Sequence[str]]) -> None:
        """Searches groups that failed together."""
        if len(groups) == 1:
            await self._within_group(groups[0])
            return
        for half in _halves(groups):
            if len(self.found) >= self._most:
                return
            if await self._fails([name for group in half for name in group]):
                await self.among_groups(half)

    async def _within_group(self, samples: Sequence[str]) -> bool:
        """Searches samples of one group that failed together, to the first culprit."""
        if len(samples) == 1:
            return await self._blame(samples[0])
        for half in _halves(samples):
            if await self._fails(half) and await self._within_group(half):
                return True
        return False

    async def _blame(self, sample: str) -> bool:
        """A sample that failed alone is to blame if it does so again."""
        failure = await self._fails([sample])
        if failure is None:
            return False
        self.found[sample] = failure
        if len(self.found) > 1 and not self._something_went_through:
            raise PoolError(
                f"{self._where}: each sample that was tried alone ({', '.join(self.found)}) ends"
                f" its worker, and nothing went through: that is no sample's fault; look at module"
                f" {failure.module!r} and its machine ({failure.cause})"
            )
        return True

    async def _fails(self, samples: Sequence[str]) -> Failure | None:
        failure = await self._attempt(samples)
        if failure is None:
            self._something_went_through = True
        return failure


def _halves(parts: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    middle = (len(parts) + 1) // 2
    return parts[:middle], parts[middle:]
