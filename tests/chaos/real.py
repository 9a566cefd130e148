"""The same points in the real roles: vLLM samples, `PolicyTrainer` trains a million weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_flows.deployments import sort_digits
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.models.vllm_policy import VLLMPolicy
from tests.chaos.toys import Visiting

__all__ = ["real_engine"]


class RealPolicy(Visiting, VLLMPolicy):
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.points.reach("sampling")
        return super().forward_step(data, iteration)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        def told() -> Iterator[tuple[str, Tensor]]:
            for index, named in enumerate(weights):
                if index == 5:
                    self.points.reach("in the middle of loading weights")
                yield named

        super().load_weights(told())
        self.points.reach("weights loaded")


class RealReward(Visiting, FunctionReward):
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.points.reach("scoring")
        return super().forward_step(data, iteration)


class RealTrainer(Visiting, PolicyTrainer):
    def setup(self) -> None:
        super().setup()
        self.optimizer.register_step_pre_hook(
            lambda *_: self.points.reach("in the middle of a step")
        )

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.points.reach("before a step")
        metrics = super().train_step(data, iteration)
        self.points.reach("after a step")
        return metrics

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.points.reach("probing")
        return super().probe_logprobs(sequences)


def _digits(completion: str) -> float:
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


def real_engine(folder: Path) -> GRPOEngine:
    """Random weights; more digits are better."""
    path = build_tiny_qwen2(
        folder.parent / "model",
        seed=0,
        characters=sort_digits.CHARACTERS,
        max_position_embeddings=64,
    )
    settings = GenerationSettings(max_new_tokens=12)
    modules: list[Any] = [
        RealPolicy("policy", path=path, generation=settings, max_model_len=32),
        RealTrainer("trainer", path=path),
        RealReward("reward", function=_digits),
    ]
    for module in modules:
        module.folder = folder
    engine = GRPOEngine(*modules, name="chaos")
    engine.set_dataset(sort_digits.training_prompts(64, seed=0))
    engine.set_eval_dataset(sort_digits.held_out_prompts(16))
    return engine
