"""A trainer whose ranks hold halves, and followers, that fail in the middle of a sync as told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_flows.modules import TorchModule
from rlhf_flows.modules.base import TakeWeights, TensorKind

__all__ = ["TENSOR_BYTES", "Follower", "HalvedTrainer", "SlowFollower", "model_of", "tell"]

TENSOR_BYTES = 1 << 16


def model_of(num_tensors: int, seed: int | None = None) -> nn.ParameterDict:
    """Tensors of 64 KiB; zeros without a seed."""
    g = torch.Generator().manual_seed(seed or 0)
    shape = (TENSOR_BYTES // 4 // 64, 64)
    return nn.ParameterDict(
        {
            f"layer_{i:03d}": torch.zeros(shape)
            if seed is None
            else torch.randn(shape, generator=g)
            for i in range(num_tensors)
        }
    )


def tell(folder: Path, who: str, what: str) -> None:
    """`who` is module/replica/rank."""
    (folder / who.replace("/", "-")).write_text(what)


class _Told(TorchModule):
    default_threads = 1

    def __init__(self, name: str, folder: Path, *, num_tensors: int = 12) -> None:
        super().__init__(name)
        self.folder, self.num_tensors = folder, num_tensors

    def setup(self) -> None:
        self.model = model_of(self.num_tensors)

    def _do_as_told(self) -> str:
        told = self.folder / f"{self.name}-{self.replica_id}-{self.rank}"
        what = told.read_text() if told.exists() else ""
        told.unlink(missing_ok=True)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what.startswith("sleep"):
            time.sleep(float(what.split()[1]))
        elif what == "raise":
            raise ValueError("no more of this")
        return what


class HalvedTrainer(_Told):
    """Each rank knows half of each tensor: weights come by a collective alone."""

    is_sharded: ClassVar[bool] = True

    def setup(self) -> None:
        self.model = model_of(self.num_tensors, seed=1)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for i, (name, whole) in enumerate(super().named_weights()):
            what = self._do_as_told() if i == self.num_tensors // 2 else ""
            if self.world_size == 1:
                parts = [whole]
            else:
                mine = whole.chunk(self.world_size)[self.rank].contiguous()
                parts = [torch.empty_like(mine) for _ in range(self.world_size)]
                torch.distributed.all_gather(parts, mine)
            yield name, torch.cat(parts) + (1 if what == "corrupt" else 0)

    def save_pretrained(self, folder: Path) -> None:
        save_file({n: p.detach() for n, p in self.model.items()}, folder / "model.safetensors")


class Follower(_Told):
    """Copies bucket by bucket; does as it is told at the third."""

    @contextmanager
    def receiving_weights(self, kinds: Sequence[TensorKind]) -> Iterator[TakeWeights]:
        taken = 0
        with super().receiving_weights(kinds) as take:

            def told(weights: Sequence[tuple[str, Tensor]]) -> None:
                nonlocal taken
                taken += 1
                if taken == 3:
                    self._do_as_told()
                take(weights)

            yield told


class SlowFollower(Follower):
    """Takes 50 ms for a bucket."""

    @contextmanager
    def receiving_weights(self, kinds: Sequence[TensorKind]) -> Iterator[Any]:
        with super().receiving_weights(kinds) as take:

            def slowly(weights: Sequence[tuple[str, Tensor]]) -> None:
                time.sleep(0.05)
                take(weights)

            yield slowly
