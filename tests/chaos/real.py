"""The same points in the real roles: vLLM samples, `PolicyTrainer` trains a million weights.

By GRPO with three models, or by PPO with six, of which two learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlhf_flows.deployments import sort_digits
from rlhf_flows.engines import GRPOEngine, RLHFEngine
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.reward_model import RewardModel
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.models.value_model import ValueModel
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.models.vllm_policy import VLLMPolicy
from tests.chaos.toys import Visiting

__all__ = ["digits", "real_engine", "rlhf_engine"]

EngineT = TypeVar("EngineT", GRPOEngine, RLHFEngine)


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


class _Training(Visiting):
    """Points in and around the steps of a trainer."""

    optimizer: Any

    def setup(self) -> None:
        super().setup()  # type: ignore[misc]
        self.optimizer.register_step_pre_hook(
            lambda *_: self.points.reach("in the middle of a step")
        )

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.points.reach("before a step")
        metrics: Mapping[str, float] = super().train_step(data, iteration)  # type: ignore[misc]
        self.points.reach("after a step")
        return metrics

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.points.reach("probing")
        found: list[list[float]] = super().probe_logprobs(sequences)  # type: ignore[misc]
        return found


class RealTrainer(_Training, PolicyTrainer):
    pass


class PPOTrainer(_Training, PPOPolicyTrainer):
    pass


class PPOValueTrainer(_Training, ValueTrainer):
    pass


class LearntReward(Visiting, RewardModel):
    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.points.reach("scoring")
        return super().forward_step(data, iteration)


class Critic(Visiting, ValueModel):
    pass


class Frozen(Visiting, Reference):
    pass


def digits(completion: str) -> float:
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


def real_engine(folder: Path) -> GRPOEngine:
    """Random weights; more digits are better."""
    path = _model(folder)
    settings = GenerationSettings(max_new_tokens=12)
    modules: list[Any] = [
        RealPolicy("policy", path=path, generation=settings, max_model_len=32),
        RealTrainer("trainer", path=path),
        RealReward("reward", function=digits),
    ]
    for module in modules:
        module.folder = folder
    return _with_prompts(GRPOEngine(*modules, name="chaos"))


def rlhf_engine(folder: Path) -> RLHFEngine:
    """Six models; policy and critic learn from a reward model of random weights."""
    path = _model(folder)
    settings = GenerationSettings(max_new_tokens=12)
    modules: list[Any] = [
        RealPolicy("policy", path=path, generation=settings, max_model_len=32),
        Frozen("reference", path=path),
        LearntReward("reward", path=path),
        Critic("value", path=path),
        PPOTrainer("trainer", path=path),
        PPOValueTrainer("value_trainer", path=path),
    ]
    for module in modules:
        module.folder = folder
    return _with_prompts(RLHFEngine(*modules, name="chaos"))


def _model(folder: Path) -> Path:
    return build_tiny_qwen2(
        folder.parent / "model",
        seed=0,
        characters=sort_digits.CHARACTERS,
        max_position_embeddings=64,
    )


def _with_prompts(engine: EngineT) -> EngineT:
    engine.set_dataset(sort_digits.training_prompts(64, seed=0))
    engine.set_eval_dataset(sort_digits.held_out_prompts(16))
    return engine
