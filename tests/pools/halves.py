"""A toy whose ranks hold different parts of its weights: sharded modules without Megatron."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.modules.base import BaseModule
from rlhf_flows.modules.hf_export import write_weights
from rlhf_flows.modules.state_pieces import PieceReader, PieceWriter, Slice

AXES = {"preferences": 0, "scales": 1}
SHAPES: dict[str, tuple[int, ...]] = {"preferences": (10,), "scales": (2, 10)}
KINDS = ("exp_avg", "exp_avg_sq")


class Halves(BaseModule):
    """Steps of REINFORCE with Adam, as `ToyTrainer`; each rank has its run of the digits.

    The file `fails`, while it is there, says what raises: "method/rank".
    """

    is_sharded = True
    default_threads = 1

    def __init__(self, name: str, *, fails: Path | None = None) -> None:
        super().__init__(name)
        self.fails = fails

    def setup(self) -> None:
        whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.parts = {name: w[self._cut(name)].clone() for name, w in whole.items()}
        for part in self.parts.values():
            part.requires_grad_()
        self.optimizer = torch.optim.Adam(self.parts.values(), lr=0.2)

    def _slice(self, name: str) -> Slice:
        each = 10 // self.world_size
        start = each * self.rank
        axis, shape = AXES[name], SHAPES[name]
        return Slice(name=name, axis=axis, start=start, stop=start + each, shape=shape)

    def _cut(self, name: str) -> tuple[slice, ...]:
        where = self._slice(name)
        return (*(slice(None),) * AXES[name], slice(where.start, where.stop))

    def _whole(self, name: str) -> Tensor:
        """Collective. With a gradient for what this rank has."""
        own = self.parts[name]
        if self.world_size == 1:
            return own
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(found, own.detach().contiguous())
        found[self.rank] = own
        return torch.cat(found, AXES[name])

    def _maybe_fail(self, method: str) -> None:
        told = self.fails.read_text() if self.fails and self.fails.exists() else ""
        if told == f"{method}/{self.rank}":
            raise OSError(5, f"a broken disk in {method}")

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        (batch,) = data
        advantage = batch["reward"] - batch["reward"].mean()
        scores = self._whole("preferences") + self._whole("scales").sum(0)
        loss = -(scores.log_softmax(-1)[batch["digit"]] * advantage).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.parts:
            yield name, self._whole(name).detach().clone()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        given = dict(weights)
        self._maybe_fail("load_weights")
        with torch.no_grad():
            for name, part in self.parts.items():
                part.copy_(given[name][self._cut(name)])

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        weights = iter(weights)
        first = next(weights)
        self._maybe_fail("export_weights")  # in the middle
        write_weights([first, *weights], folder)

    def save_state(self, folder: Path) -> None:
        self._maybe_fail("save_state")
        writer = PieceWriter(folder, self.rank, max_file_bytes=1)
        for name, part in self.parts.items():
            state = self.optimizer.state[part]
            writer.add(self._slice(name), {k: state[k] for k in KINDS}, step=int(state["step"]))
        writer.close({"world_size": self.world_size, "kinds": KINDS})

    def state_files(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        return sorted(PieceReader(folder).files([self._slice(name) for name in self.parts]))

    def load_state(self, folder: Path) -> None:
        reader = PieceReader(folder)
        reader.check([self._slice(name) for name in self.parts], KINDS)
        for name, part in self.parts.items():
            tensors, step = reader.read(self._slice(name), KINDS)
            self.optimizer.state[part] = {**tensors, "step": torch.tensor(float(step))}
