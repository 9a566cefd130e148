"""A reward model, learnt from preferences (InstructGPT, arXiv 2203.02155, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.dpo import PairsRuntime
from rlhf_flows.deployments.fields import TrainingFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.engines import RewardModelEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.reward_model import RewardModel
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.settings import RewardModelSettings

__all__ = ["RECIPE", "RewardModelConfig", "build", "reward_model"]


class RewardModelConfig(TrainingFields):
    """What `rlhf-flows train reward_model` can be asked for."""

    dataset: DatasetSettings = Field(
        title="Preferences",
        description="A JSONL, JSON or Parquet file with rows {prompt, chosen, rejected} or"
        " {prompt, pos_answers, neg_answers}, by path or URL.",
    )
    eval_dataset: DatasetSettings | None = Field(
        default=None,
        title="Held-out preferences",
        description="Held-out preferences; of the type of `dataset` if they say none.",
    )
    runtime: PairsRuntime = Field(default_factory=PairsRuntime)
    reward_model: RewardModelSettings = Field(
        default_factory=RewardModelSettings,
        title="Reward model",
        description="What the reward model learns from a pair of completions.",
    )


def build(config: RewardModelConfig) -> RewardModelEngine:
    """The engine that the configuration describes."""
    trainer = on_backend(
        RewardTrainer,
        "trainer",
        settings=config.reward_model,
        chat_template=config.chat_template,
        dataset=config.dataset.type,
        dataset_args=config.dataset.args,
        **config.trainer_arguments,
    )
    held_out = config.eval_dataset or config.dataset
    follower = RewardModel(
        "reward",
        path=config.folder,
        settings=config.reward_model,
        dtype=config.dtype,
        chat_template=config.chat_template,
        dataset=held_out.type or config.dataset.type,
        dataset_args=held_out.args or config.dataset.args,
    )
    engine = RewardModelEngine(trainer, follower, name="reward_model").configure(config)
    engine.set_dataset(config.dataset.path)
    if config.eval_dataset is not None:
        engine.set_eval_dataset(config.eval_dataset.path)
    return engine


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (
        f"rlhf-flows train ppo model={config.model} reward.model=run:{result.run} prompts=FILE"
        f"{store_words(config, 'store.url=')}",
    )


RECIPE = EngineRecipe(
    name="reward_model",
    description=OWN["reward_model"],
    config=RewardModelConfig,
    build=build,
    objective="accuracy",
    next_steps=_next,
)
reward_model = RECIPE.flow()
