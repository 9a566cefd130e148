"""One digest of a model's weights, wherever they are: in a trainer, in buckets, in a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["WeightsDigest", "digest_weights", "tensor_bytes"]


class WeightsDigest:
    """sha256 over name, dtype, shape and bytes of each tensor, in the order they are given."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, name: str, dtype: str, shape: Iterable[int], data: NDArray[np.uint8]) -> None:
        header = f"{name}|{dtype}|{','.join(map(str, shape))}|"
        self._hash.update(header.encode())
        self._hash.update(data.data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor as a flat array, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()  # type: ignore[no-any-return, unused-ignore]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digest_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = WeightsDigest()
    for name, tensor in weights:
        digest.update(name, dtype_name(tensor.dtype), tensor.shape, tensor_bytes(tensor))
    return digest.hexdigest()
