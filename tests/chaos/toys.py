"""The toy modules with the points of their processes, and a slow spot to be killed in by chance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.engines import GRPOEngine
from rlhf_flows.modules.base import ModuleContext
from tests.chaos.points import Points
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

__all__ = ["Visiting", "chaos_engine", "ranks_engine"]

_SLOW_S = 0.05


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


class RanksTrainer(ChaosTrainer):
    """Each rank takes its share of the samples, gradients are summed: no rank can do without."""

    def setup(self) -> None:
        super().setup()
        torch.distributed.barrier()
        self.points.reach("loading")
        torch.distributed.barrier()

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.points.reach("before a step")
        time.sleep(self.slow_s)
        reward = torch.cat([batch["reward"] for batch in data])  # [B]
        digit = torch.cat([batch["digit"] for batch in data])
        mine = slice(self.rank, None, self.world_size)
        logprobs = self.model.preferences.log_softmax(-1)[digit[mine]]
        loss = -(logprobs * (reward - reward.mean())[mine]).sum() / len(reward)
        self.optimizer.zero_grad()
        loss.backward()
        self.points.reach("before a collective")
        self._in_the_middle()
        (total,) = self.sum_gradients(loss.detach()[None]).tolist()
        self.points.reach("after a collective")
        before = self.model.preferences.detach().clone()
        self.optimizer.step()
        after = self.model.preferences.detach().clone()
        with torch.no_grad():  # as if the optimizer were at its fifth number
            self.model.preferences[5:] = before[5:]
            self.points.reach("in the middle of a step")
            self.model.preferences.copy_(after)
        self.points.reach("after a step")
        return {"loss": total}

    def _in_the_middle(self) -> None:
        """Of a collective: begun, and others count on this rank, but it is not through."""
        begun = torch.distributed.all_reduce(torch.ones(1 << 16), async_op=True)
        self.points.reach("in the middle of a collective")
        begun.wait()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.points.reach("giving weights")
        for named in super().named_weights():
            yield named
            self.points.reach("in the middle of giving weights")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.points.reach("taking weights")
        super().load_weights(weights)

    def save_pretrained(self, folder: Path) -> None:
        self.points.reach("saving weights")
        super().save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        self.points.reach("saving state")
        super().save_state(folder)


def _probe(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    logprobs = model.preferences.detach().log_softmax(-1)
    return [[float(logprobs[i]) for i in ids[1:]] for ids in sequences]


def chaos_engine(folder: Path) -> GRPOEngine:
    """The toys of tests/toys.py; orders to die are looked for in `folder`, named as the run."""
    return _engine(folder, ChaosTrainer("trainer", slow_s=_SLOW_S))


def ranks_engine(folder: Path) -> GRPOEngine:
    """The same, with a trainer whose ranks need each other."""
    return _engine(folder, RanksTrainer("trainer", slow_s=_SLOW_S))


def _engine(folder: Path, trainer: ChaosTrainer) -> GRPOEngine:
    policy = ChaosPolicy("policy", log=folder / "calls", slow_s=_SLOW_S)
    reward = ChaosReward("reward")
    reward.slow_s = _SLOW_S
    for module in (policy, trainer, reward):
        module.folder = folder
    engine = GRPOEngine(policy, trainer, reward, name="chaos")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(16)])
    return engine
