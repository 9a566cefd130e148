"""Workers and pools without Ray: the same `Worker`, called in this process.

Through the seams that exist: a `Transport`, and the few methods of a pool that phases call.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rlhf_flows.pools import PoolSpec, Replica, WeightsSource
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.pools.worker import Worker

__all__ = ["InProcessPool"]


class _Handover:
    """A transport within one process: the digest is made and checked as everywhere."""

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        bucket_bytes: int,
        digest: str | None = None,
    ) -> WeightsSource:
        copies = [(name, tensor.clone()) for name, tensor in weights]
        return WeightsSource(
            version=version,
            digest=digest or digest_weights(copies),
            manifest=(),
            buckets=(),
            refs=tuple(copies),
            num_bytes=sum(t.nbytes for _, t in copies),
        )

    def receive(self, source: WeightsSource, *, timeout_s: float) -> Iterator[tuple[str, Tensor]]:
        assert digest_weights(source.refs) == source.digest
        yield from source.refs


class _InProcessWorker(Worker):
    def __init__(self, spec: PoolSpec) -> None:
        super().__init__(spec)
        self._transport = _Handover()  # type: ignore[assignment] # the seam is a Protocol


class InProcessPool:
    """One replica of one rank, called directly. Counts the seconds of each method."""

    def __init__(self, spec: PoolSpec) -> None:
        self.name = spec.module_name
        self.bring_to: Any = None
        self.moving = asyncio.Lock()
        self.seconds: dict[str, float] = defaultdict(float)
        self._worker = _InProcessWorker(spec)
        state = self._worker.setup(1)
        self.replicas = [Replica(index=0, ranks=[], state=state)]

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
        self, replica: Replica, method: str, *args: Any, what: str, timeout_s: float
    ) -> Any:
        return await self.call(method, *args, what=what, timeout_s=timeout_s)

    def tell(self, replica: Replica, method: str, *args: Any) -> None:
        getattr(self._worker, method)(1, *args)
