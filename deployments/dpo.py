"""DPO: preferences teach the policy itself, without a reward model (arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.fields import TrainingFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.engines import DPOEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.preference_reference import PreferenceReference
from rlhf_flows.settings import DPOSettings

__all__ = ["RECIPE", "DPOConfig", "build", "dpo"]


class PairsRuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`; an episode is a number of pairs."""

    form_first: ClassVar[tuple[str, ...]] = (
        "num_episode",
        "sample_per_episode",
        "train_global_batch_size",
        "seed",
    )

    sample_per_episode: int = Field(
        default=1024, ge=1, title="Pairs per episode", description="Pairs of one episode."
    )
    train_global_batch_size: int | None = Field(
        default=64,
        ge=1,
        title="Pairs per training step",
        description="Pairs of one optimizer step.",
    )


class DPOConfig(TrainingFields):
    """What `rlhf-flows train dpo` can be asked for."""

    dataset: DatasetSettings = Field(
        title="Preferences",
        description="A JSONL, JSON or Parquet file with rows {prompt, chosen, rejected} or"
        " {prompt, pos_answers, neg_answers}, by path or URL.",
    )
    runtime: PairsRuntime = Field(default_factory=PairsRuntime)
    dpo: DPOSettings = Field(
        default_factory=DPOSettings,
        title="DPO",
        description="What the model learns from a pair of completions.",
    )


def build(config: DPOConfig) -> DPOEngine:
    """The engine that the configuration describes."""
    reference = PreferenceReference(
        "reference",
        path=config.folder,
        dpo=config.dpo,
        dtype=config.dtype,
        chat_template=config.chat_template,
        dataset=config.dataset.type,
        dataset_args=config.dataset.args,
    )
    trainer = on_backend(DPOTrainer, "trainer", dpo=config.dpo, **config.trainer_arguments)
    engine = DPOEngine(reference, trainer, name="dpo").configure(config)
    engine.set_dataset(config.dataset.path)
    return engine


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (
        f"rlhf-flows export {result.run}{store_words(config)} --to model",
        f"rlhf-flows train generate model=run:{result.run} prompts=FILE"
        f"{store_words(config, 'store.url=')}",
    )


RECIPE = EngineRecipe(
    name="dpo",
    description=OWN["dpo"],
    config=DPOConfig,
    build=build,
    objective="accuracy",
    next_steps=_next,
)
dpo = RECIPE.flow()
