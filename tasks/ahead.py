"""`Ahead`: which version training may begin from, while the one before is on its way to the store.

A version is written (its files lie on the trainer's disk, and it may be trained on), then committed
(they are in the store, and everybody else may rely on it). The decision here: written is not real.
What is trained on it counts only once it is committed, and where that comes to nothing, who trained
on it begins again. So one version is on its way at most. Knows asyncio alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

from rlhf_flows.errors import NotBegunError
from rlhf_flows.together import beside

__all__ = ["Ahead", "VersionLostError"]


class VersionLostError(NotBegunError):
    """The version that training began from did not come to be committed."""


class Ahead:
    """The newest version of this attempt, as its trainings know it."""

    def __init__(self, committed: int) -> None:
        """
        Args:
            committed: The newest version that the store has.
        """
        self._committed = self._written = committed
        self._trains = asyncio.Lock()
        """Held by who uses the trainers."""
        self._news = asyncio.Event()

    # ---- told by training ------------------------------------------------------------------

    def write(self, version: int) -> None:
        """Its files are written."""
        assert version == self._committed + 1
        self._written = version
        self._tell()

    def commit(self, version: int) -> None:
        self._committed = self._written = version
        self._tell()

    def lose(self) -> None:
        """What is on its way will not arrive."""
        self._written = self._committed
        self._tell()

    # ---- waited for ------------------------------------------------------------------------

    async def until_written(self, version: int) -> None:
        await self._until(lambda: self._written >= version)

    async def until_committed(self, version: int) -> None:
        await self._until(lambda: self._committed >= version)

    @contextlib.asynccontextmanager
    async def training_from(self, version: int) -> AsyncIterator[None]:
        """Around the use of the trainers, for what begins from `version`: once it is written, and
        nobody else uses them.

        An error inside waits until that version is committed: it is worth having, whatever became
        of this.

        Raises:
            VersionLostError: the version is lost; whatever else went wrong, this begins again.
        """
        await self._turn(version)
        try:
            async with beside(self._watch(version)):
                yield
        except Exception as error:
            await self._until(lambda: self._committed >= version or self._written < version)
            if self._written < version and not isinstance(error, VersionLostError):
                raise _lost(version) from error
            raise
        finally:
            self._trains.release()

    async def _turn(self, version: int) -> None:
        while True:
            await self.until_written(version)
            await self._trains.acquire()
            if self._written >= version:
                return
            self._trains.release()

    async def _watch(self, version: int) -> NoReturn:
        await self._until(lambda: self._written < version)
        raise _lost(version)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _lost(version: int) -> VersionLostError:
    return VersionLostError(
        f"version {version} was lost on its way to the store: what was trained on it begins again"
    )
