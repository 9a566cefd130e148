"""A trainer and a follower of plain tensors, shaped like the layers of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_flows.models import VLLMPolicy
from rlhf_flows.modules import TorchModule
from rlhf_flows.modules.base import TakeWeights, TensorKind

__all__ = ["Holder", "TimedHolder", "TimedVLLMPolicy"]

TENSOR_BYTES = 4 << 20


class Holder(TorchModule):
    """Tensors of 4 MiB."""

    default_threads = 1

    def __init__(self, name: str, *, num_bytes: int, seed: int = 0) -> None:
        super().__init__(name)
        self.num_bytes, self.seed = num_bytes, seed

    def setup(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.model = nn.ParameterList(
            torch.randn(TENSOR_BYTES // 4 // 1024, 1024, generator=g)
            for _ in range(self.num_bytes // TENSOR_BYTES)
        )


class _Timed:
    """Writes the seconds that its last load of weights took to `folder`, beside its replica."""

    folder: Path
    replica_id: int

    @contextmanager
    def receiving_weights(self, kinds: Sequence[TensorKind]) -> Iterator[TakeWeights]:
        receiving: Any = super()
        seconds = -time.perf_counter()
        with receiving.receiving_weights(kinds) as take:
            seconds += time.perf_counter()

            def timed(weights: Sequence[tuple[str, Tensor]]) -> None:
                nonlocal seconds
                started = time.perf_counter()
                take(weights)
                seconds += time.perf_counter() - started

            yield timed
            seconds -= time.perf_counter()
        seconds += time.perf_counter()
        (self.folder / f"load-{self.replica_id}").write_text(str(seconds))


class TimedHolder(_Timed, Holder):
    def __init__(self, name: str, *, num_bytes: int, folder: Path) -> None:
        super().__init__(name, num_bytes=num_bytes, seed=1)
        self.folder = folder


class TimedVLLMPolicy(_Timed, VLLMPolicy):
    def __init__(self, name: str, *, path: Path, folder: Path) -> None:
        super().__init__(name, path=path, dtype="float32")
        self.folder = folder
