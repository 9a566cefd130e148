"""Supervised fine-tuning: an engine with a dataset and a trainer, no environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rlhf_flows.config import EngineConfig, RuntimeConfig
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.engines import SFTEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.settings import OptimizerSettings, SFTSettings

__all__ = ["RECIPE", "SFTConfig", "build", "sft"]


class SFTRuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`; an episode is a number of demonstrations."""

    sample_per_episode: int = Field(
        default=1024, ge=1, description="Demonstrations of one episode."
    )
    train_global_batch_size: int | None = Field(
        default=64, ge=1, description="Demonstrations of one optimizer step."
    )


class SFTConfig(EngineConfig):
    """What `rlhf-flows train sft` can be asked for."""

    model: str = Field(description="A local Hugging Face folder: model and tokenizer.")
    dataset: DatasetSettings = Field(
        description="A JSONL, JSON or Parquet file of rows with `prompt` (text or chat messages)"
        " and `completion` or `answer`; with `type`, of whatever that takes."
    )
    runtime: SFTRuntime = Field(default_factory=SFTRuntime)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of the weights.")
    micro_batch_tokens: int = Field(default=4096, ge=1, description="Tokens of one pass.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, a third more time."
    )
    chat_template: bool | None = Field(
        default=None,
        description="Render prompts by the chat template; by default chat messages only.",
    )


def build(config: SFTConfig, *, dataset: Any = None) -> SFTEngine:
    """The engine that the configuration describes."""
    trainer = SFTTrainer(
        "trainer",
        path=config.model,
        optimizer=config.optimizer,
        sft=config.sft,
        micro_batch_tokens=config.micro_batch_tokens,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        chat_template=config.chat_template,
        dataset=config.dataset.type,
        dataset_args=config.dataset.args,
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
