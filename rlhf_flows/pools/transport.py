"""How weights travel: the seam, and the transport through Ray's object store.

A transport packs a trainer's weights into buckets and unpacks them at the receiver. The receiver
checks the digest of the bytes before any of them reaches the model: a failed load leaves some
engines unusable. Transports between GPUs (NCCL, CUDA IPC) implement the same two functions.

Peak extra memory: one bucket at the sender beside what the object store holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_flows.errors import SyncError
from rlhf_flows.pools.digest import WeightsDigest, dtype_name, tensor_bytes
from rlhf_flows.pools.messages import WeightsSource

__all__ = ["ObjectStoreTransport", "Transport"]

_ALIGNMENT = 64
"""Bytes; each tensor of a bucket starts at a multiple, so that it can be viewed in place."""


class Transport(Protocol):
    """Moves weights from the worker that trained them to the workers that sample with them."""

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        bucket_bytes: int,
        digest: str | None = None,
    ) -> WeightsSource:
        """Runs in the trainer. `digest` is that of the weights, where it is known already."""

    def receive(self, source: WeightsSource, *, timeout_s: float) -> Iterator[tuple[str, Tensor]]:
        """Runs in the receiver: verifies the digest, then gives the weights one by one."""


class ObjectStoreTransport:
    """Buckets as Ray objects: shared memory on one node, Ray's own transfer between nodes."""

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        bucket_bytes: int,
        digest: str | None = None,
    ) -> WeightsSource:
        counted = WeightsDigest() if digest is None else None
        manifest: list[tuple[str, str, tuple[int, ...]]] = []
        buckets: list[tuple[int, ...]] = []
        refs: list[Any] = []
        pending: list[tuple[int, NDArray[np.uint8]]] = []
        total = size = 0

        def flush() -> None:
            nonlocal size
            if pending:
                refs.append(ray.put(_join([data for _, data in pending])))
                buckets.append(tuple(index for index, _ in pending))
                pending.clear()
                size = 0

        for name, tensor in weights:
            data = tensor_bytes(tensor)
            dtype = dtype_name(tensor.dtype)
            if counted is not None:
                counted.update(name, dtype, tensor.shape, data)
            if size and size + data.nbytes > bucket_bytes:
                flush()
            pending.append((len(manifest), data))
            manifest.append((name, dtype, tuple(tensor.shape)))
            size += _aligned(data.nbytes)
            total += data.nbytes
        flush()
        return WeightsSource(
            version=version,
            digest=digest or ("" if counted is None else counted.hexdigest()),
            manifest=tuple(manifest),
            buckets=tuple(buckets),
            refs=tuple(refs),
            num_bytes=total,
        )

    def receive(self, source: WeightsSource, *, timeout_s: float) -> Iterator[tuple[str, Tensor]]:
        try:
            arrays = ray.get(list(source.refs), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as e:
            raise SyncError(
                f"the weights of version {source.version} ({source.num_bytes} bytes) did not"
                f" arrive within {timeout_s:g} s: raise runtime.sync_timeout_s, or look at the"
                " network between the trainer and this worker"
            ) from e
        digest = WeightsDigest()
        for name, dtype, shape, data in _split(source, arrays):
            digest.update(name, dtype, shape, data)
        if digest.hexdigest() != source.digest:
            raise SyncError(
                f"the weights of version {source.version} arrived with digest"
                f" {digest.hexdigest()[:12]}, sent was {source.digest[:12]}: nothing was loaded"
            )
        for name, dtype, shape, data in _split(source, arrays):
            yield name, _as_tensor(data, dtype, shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _join(parts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    joined = np.zeros(sum(_aligned(p.nbytes) for p in parts), dtype=np.uint8)
    start = 0
    for part in parts:
        joined[start : start + part.nbytes] = part
        start += _aligned(part.nbytes)
    return joined


def _split(
    source: WeightsSource, arrays: list[NDArray[np.uint8]]
) -> Iterator[tuple[str, str, tuple[int, ...], NDArray[np.uint8]]]:
    for indices, array in zip(source.buckets, arrays, strict=True):
        start = 0
        for index in indices:
            name, dtype, shape = source.manifest[index]
            size = int(np.prod(shape, dtype=np.int64)) * getattr(torch, dtype).itemsize
            yield name, dtype, shape, array[start : start + size]
            start += _aligned(size)


def _as_tensor(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        # Objects of the store are read-only; receivers copy weights and never write to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
