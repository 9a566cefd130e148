"""The toy modules with the points of their processes, and a slow spot to be killed in by chance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.engines import GRPOEngine
from rlhf_flows.modules.base import ModuleContext
from tests.chaos.points import Points
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

__all__ = ["Visiting", "chaos_engine"]


class Visiting:
    """Mixed into a module: its worker process has points."""

    folder: Path
    name: str

    def attach(self, context: ModuleContext) -> None:
        super().attach(context)  # type: ignore[misc]
        who = f"{self.name} rank {context.rank}" if context.rank else self.name
        self.points = Points(who, self.folder)
        self.points.install()
        (self.folder / f"pid-{who}").write_text(str(os.getpid()))


class ChaosPolicy(Visiting, ToyPolicy):
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.points.reach("sampling")
        return super().forward_step(data, iteration)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        weights = [(name, tensor.clone()) for name, tensor in weights]
        half = [(name, torch.where(torch.arange(len(t)) < 5, t, 0.0)) for name, t in weights]
        super().load_weights(half)
        self.points.reach("in the middle of loading weights")
        super().load_weights(weights)
        self.points.reach("weights loaded")

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return _probe(self.model, sequences)


class ChaosReward(Visiting, ToyReward):
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.points.reach("scoring")
        time.sleep(self.slow_s)
        return super().forward_step(data, iteration)

    slow_s = 0.0


class ChaosTrainer(Visiting, ToyTrainer):
    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.points.reach("before a step")
        self._meet()
        before = self.model.preferences.detach().clone()
        metrics = super().train_step(data, iteration)
        after = self.model.preferences.detach().clone()
        with torch.no_grad():  # as if the optimizer were at its fifth number
            self.model.preferences[5:] = before[5:]
            self.points.reach("in the middle of a step")
            self.model.preferences.copy_(after)
        self._meet()
        self.points.reach("after a step")
        return metrics

    def _meet(self) -> None:
        """Where a trainer of several ranks waits for them all, as for their gradients."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.points.reach("probing")
        return _probe(self.model, sequences)

    def vocabulary_size(self) -> int:
        return 10


def _probe(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    logprobs = model.preferences.detach().log_softmax(-1)
    return [[float(logprobs[i]) for i in ids[1:]] for ids in sequences]


def chaos_engine(folder: Path, *, slow_s: float = 0.0) -> GRPOEngine:
    """The toys of tests/toys.py; orders to die are looked for in `folder`, named as the run."""
    modules: list[Any] = [
        ChaosPolicy("policy", log=folder / "calls", slow_s=slow_s),
        ChaosTrainer("trainer", slow_s=slow_s),
        ChaosReward("reward"),
    ]
    for module in modules:
        module.folder = folder
    modules[2].slow_s = slow_s
    engine = GRPOEngine(*modules, name="chaos")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(16)])
    return engine
