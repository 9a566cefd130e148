"""Supervised fine-tuning: an engine with a dataset and a trainer, no environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.fields import TrainingFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.engines import SFTEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.settings import SFTSettings

__all__ = ["RECIPE", "SFTConfig", "build", "sft"]


class SFTRuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`; an episode is a number of demonstrations."""

    form_first: ClassVar[tuple[str, ...]] = (
        "num_episode",
        "sample_per_episode",
        "train_global_batch_size",
        "seed",
    )

    sample_per_episode: int = Field(
        default=1024,
        ge=1,
        title="Demonstrations per episode",
        description="Demonstrations of one episode.",
    )
    train_global_batch_size: int | None = Field(
        default=64,
        ge=1,
        title="Demonstrations per training step",
        description="Demonstrations of one optimizer step.",
    )


class SFTConfig(TrainingFields):
    """What `rlhf-flows train sft` can be asked for."""

    dataset: DatasetSettings = Field(
        title="Demonstrations",
        description="A JSONL, JSON or Parquet file of rows with `prompt` (text or chat messages)"
        " and `answer` or `completion`, by path or URL. With `type`, of whatever"
        " that takes.",
    )
    runtime: SFTRuntime = Field(default_factory=SFTRuntime)
    sft: SFTSettings = Field(
        default_factory=SFTSettings,
        title="Fine-tuning",
        description="How the loss is taken, and how long a row may be.",
    )


def build(config: SFTConfig, *, dataset: Any = None) -> SFTEngine:
    """The engine that the configuration describes; rows may be given in place of a file."""
    trainer = on_backend(
        SFTTrainer,
        "trainer",
        sft=config.sft,
        chat_template=config.chat_template,
        dataset=config.dataset.type,
        dataset_args=config.dataset.args,
        **config.trainer_arguments,
    )
    engine = SFTEngine(trainer, name="sft").configure(config)
    return engine.set_dataset(config.dataset.path if dataset is None else dataset)


def _next(config: Any, result: RunResult) -> Sequence[str]:
    in_store = store_words(config, "store.url=")
    return (
        f"rlhf-flows export {result.run}{store_words(config)} --to model",
        f"rlhf-flows train grpo model=run:{result.run} prompts=FILE"
        f" reward=package.module:function{in_store}",
    )


RECIPE = EngineRecipe(
    name="sft",
    description=OWN["sft"],
    config=SFTConfig,
    build=build,
    objective="loss",
    next_steps=_next,
)
sft = RECIPE.flow()
