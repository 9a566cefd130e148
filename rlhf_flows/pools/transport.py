"""How weights travel: cut into buckets at the sender, checked and put together at the receiver.

A bucket holds the bytes of some weights as they lie in the trainer; the first says what all of them
are. The receiver checks the digest of each weight before any of its bucket reaches the model: a
failed load leaves some engines unusable. Who moves the buckets is nobody's affair here: Ray does
(pools/delivery.py), and writes views of the trainer's own memory straight into shared memory, so
that a bucket is copied once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_flows.errors import SyncError
from rlhf_flows.pools.digest import DigestedTensor, digest_tensor, dtype_name, tensor_bytes

__all__ = ["Bucket", "Manifest", "cut", "pack", "unpack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is on its way."""

    version: int
    digest: str
    """sha256 of all weights: that of the commit."""
    tensors: tuple[DigestedTensor, ...]
    """In the order they come."""
    buckets: tuple[range, ...]
    """Which of the tensors are in each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some of the weights."""

    index: int
    parts: tuple[NDArray[np.uint8], ...]
    """The bytes of each of its tensors."""
    manifest: Manifest | None
    """In the first bucket alone."""


def cut(tensors: Sequence[DigestedTensor], bucket_bytes: int) -> tuple[range, ...]:
    """Buckets of at most so many bytes, or of one tensor; one bucket where there are no tensors."""
    buckets: list[range] = []
    start = size = 0
    for index, tensor in enumerate(tensors):
        if index > start and size + tensor.num_bytes > bucket_bytes:
            buckets.append(range(start, index))
            start, size = index, 0
        size += tensor.num_bytes
    return (*buckets, range(start, len(tensors)))


def pack(weights: Iterable[tuple[str, Tensor]], manifest: Manifest) -> Iterator[Bucket]:
    """The buckets of a manifest. The bytes are the weights' own where these lie on the CPU.

    Raises:
        SyncError: the weights are not those of the manifest; all were iterated over.
    """
    rest = iter(weights)
    for index, tensors in enumerate(manifest.buckets):
        parts = []
        for expected in tensors:
            name, tensor = next(rest, ("nothing", None))
            found = () if tensor is None else (dtype_name(tensor.dtype), tuple(tensor.shape))
            if tensor is None or (name, *found) != manifest.tensors[expected].kind:
                _exhaust(rest)
                raise SyncError(
                    f"the weights to be sent are not those of the commit of version"
                    f" {manifest.version}: {name} {found} came, expected"
                    f" {manifest.tensors[expected].kind}: `named_weights` must give the same"
                    " tensors in the same order, whenever it is asked"
                )
            parts.append(tensor_bytes(tensor))
            del tensor
        yield Bucket(index=index, parts=tuple(parts), manifest=None if index else manifest)
        parts.clear()
    _exhaust(rest)


def _exhaust(rest: Iterator[object]) -> None:
    """To the end: other ranks may be taking part."""
    for _ in rest:
        pass


def unpack(bucket: Bucket, manifest: Manifest) -> list[tuple[str, Tensor]]:
    """The weights of a bucket, in its own memory: to be read, not written.

    Raises:
        SyncError: the bytes are not those that were committed.
    """
    tensors = [manifest.tensors[i] for i in manifest.buckets[bucket.index]]
    weights = []
    for tensor, data in zip(tensors, bucket.parts, strict=True):
        if digest_tensor(tensor.kind, data) != tensor.digest:
            raise SyncError(
                f"{tensor.name} of version {manifest.version} arrived with other bytes than were"
                f" committed (bucket {bucket.index + 1} of {len(manifest.buckets)}): none of this"
                " bucket was loaded"
            )
        weights.append((tensor.name, _as_tensor(tensor, data)))
    return weights


def _as_tensor(tensor: DigestedTensor, data: NDArray[np.uint8]) -> Tensor:
    dtype = getattr(torch, tensor.dtype)
    if not data.size:
        return torch.empty(tensor.shape, dtype=dtype)
    with warnings.catch_warnings():
        # Objects of the store are read-only; receivers copy weights and never write to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype).reshape(tensor.shape)
