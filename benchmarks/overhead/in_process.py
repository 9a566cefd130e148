"""Workers and pools without Ray: the same `Worker`, called in this process.

Through the few methods of a pool that phases call: buckets of weights are handed over as they are.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from rlhf_flows.pools import PoolSpec, Replica
from rlhf_flows.pools.worker import Worker

__all__ = ["InProcessPool"]


class InProcessPool:
    """One replica of one rank, called directly. Counts the seconds of each method."""

    def __init__(self, spec: PoolSpec) -> None:
        self.name, self.spec, self.attempt = spec.module_name, spec, 1
        self.bring_to: Any = None
        self.moving = asyncio.Lock()
        self.seconds: dict[str, float] = defaultdict(float)
        self._worker = Worker(spec)
        state = self._worker.setup(1)
        self.replicas = [Replica(index=0, ranks=[], names=(), state=state)]

    def set_dataset(self, kind: str, digest: str, rows: Sequence[Any]) -> None:
        self._worker.load_dataset(1, kind, digest, rows)

    async def call(
        self,
        method: str,
        *args: Any,
        what: str,
        timeout_s: float,
        version: int | None = None,
        num_returns: int = 1,
        wait_s: float | None = None,
        suspect: bool = False,
        as_held: bool = False,
    ) -> Any:
        (replica,) = self.replicas
        if version is not None and replica.version != version:
            await self.bring_to(self, replica, version)
        started = time.perf_counter()
        try:
            return getattr(self._worker, method)(*args)
        finally:
            self.seconds[method] += time.perf_counter() - started

    async def on_replica(
        self,
        replica: Replica,
        method: str,
        *args: Any,
        what: str,
        timeout_s: float,
        waits_for_store: bool = True,
    ) -> Any:
        return await self.call(method, *args, what=what, timeout_s=timeout_s)

    async def beside(
        self, replica: Replica, method: str, *args: Any, what: str, timeout_s: float
    ) -> list[Any]:
        return [await self.call(method, *args, what=what, timeout_s=timeout_s)]

    async def stream(
        self, method: str, *args: Any, what: str, timeout_s: float
    ) -> AsyncGenerator[Any, None]:
        assert method == "stream_weights"
        for bucket in self._worker._weights.stream(*args[1:], packs=True):
            yield [bucket]

    def tell(self, replica: Replica, method: str, *args: Any) -> None:
        getattr(self._worker, method)(1, *args)
