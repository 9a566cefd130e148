"""The points of a trainer whose two ranks share every layer of a Megatron model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_flows.deployments import sort_digits
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.megatron.trainers import MegatronPolicyTrainer
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.models.torch_policy import TorchPolicy
from rlhf_flows.settings import BackendSettings, OptimizerSettings
from tests.chaos.real import digits
from tests.chaos.toys import Visiting

__all__ = ["megatron_engine"]


class SharedTrainer(Visiting, MegatronPolicyTrainer):
    def setup(self) -> None:
        self.points.reach("loading")
        super().setup()

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.points.reach("before a step")
        metrics = super().train_step(data, iteration)
        self.points.reach("after a step")
        return metrics

    def logprobs_of(self, data: dict[str, Any], **options: Any) -> Any:
        self.points.reach("in the middle of a collective")  # the others wait for this rank's layers
        return super().logprobs_of(data, **options)

    def backward_all(self, data: Any, loss_of: Any) -> Any:
        self.points.reach("before a collective")
        found = super().backward_all(data, loss_of)
        self.points.reach("after a collective")
        return found

    def optimizer_step(self, sums: Tensor) -> tuple[Tensor, dict[str, float]]:
        self.points.reach("in the middle of a step")
        return super().optimizer_step(sums)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.points.reach("giving weights")
        for index, named in enumerate(super().named_weights()):
            if index == 5:
                self.points.reach("in the middle of giving weights")
            yield named

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.points.reach("taking weights")
        super().load_weights(weights)

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        self.points.reach("saving weights")
        super().export_weights(weights, folder)

    def save_state(self, folder: Path) -> None:
        self.points.reach("saving state")
        super().save_state(folder)

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.points.reach("probing")
        return super().probe_logprobs(sequences)


class SharedPolicy(Visiting, TorchPolicy):
    pass


class SharedReward(Visiting, FunctionReward):
    pass


def megatron_engine(folder: Path) -> GRPOEngine:
    """Random weights; more digits are better."""
    path = build_tiny_qwen2(
        folder.parent / "model",
        seed=0,
        hidden_size=128,
        num_layers=2,
        characters=sort_digits.CHARACTERS,
        max_position_embeddings=64,
    )
    modules: list[Any] = [
        SharedPolicy("policy", path=path, generation=GenerationSettings(max_new_tokens=8)),
        SharedTrainer(
            "trainer",
            path=path,
            optimizer=OptimizerSettings(learning_rate=1e-3),
            megatron=BackendSettings(backend="megatron", tensor_parallel=2),
        ),
        SharedReward("reward", function=digits),
    ]
    for module in modules:
        module.folder = folder
    engine = GRPOEngine(*modules, name="chaos")
    engine.set_dataset(sort_digits.training_prompts(64, seed=0))
    engine.set_eval_dataset(sort_digits.held_out_prompts(16))
    return engine
