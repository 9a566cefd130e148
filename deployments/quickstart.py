"""The quickstart: a small model learns to sort digits, in minutes, on two CPU cores.

Two runs of the same system. The warm-up is supervised fine-tuning on demonstrations that are wrong
more often than right, so that the model knows what an answer looks like but not which answer is
wanted; GRPO then finds out from the reward. Nothing is downloaded: the model is built here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prefect import flow
from prefect.context import FlowRunContext
from pydantic import Field

from rlhf_flows.attempt import (
    fill_in,
    named_by_flow_run,
    new_run_name,
    open_probed_store,
    without_abort,
)
from rlhf_flows.blocks import apply_defaults
from rlhf_flows.config import EngineConfig
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments import grpo as grpo_recipe
from rlhf_flows.deployments import sft as sft_recipe
from rlhf_flows.deployments import sort_digits
from rlhf_flows.deployments.grpo import GRPOConfig, GRPORuntime
from rlhf_flows.deployments.recipe import OWN, Recipe, RecipeResult, store_words
from rlhf_flows.deployments.sft import SFTConfig, SFTRuntime
from rlhf_flows.errors import ConfigError
from rlhf_flows.exports import exported_model
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.samplers import Sampler, describe_sampler, policy_class
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.services.environment import cache_folder
from rlhf_flows.settings import BackendSettings, GRPOSettings, OptimizerSettings
from rlhf_flows.tasks.progress import Progress

__all__ = ["RECIPE", "QuickstartConfig", "quickstart"]

REINFORCEMENT_STEPS = 60
"""Horizon of GRPO's learning rate: of a run's identity, so it does not follow `num_episode`."""
WARMUP = "-warmup"
"""What the name of the first run has more than that of the second."""
REWARD = "rlhf_flows.deployments.sort_digits:reward"


class QuickstartRuntime(GRPORuntime):
    """The loop of GRPO, in a size that two cores run in a minute."""

    num_episode: int = Field(
        default=30, ge=1, title="Number of episodes", description="Episodes of GRPO."
    )
    sample_per_episode: int = Field(
        default=512,
        ge=1,
        title="Completions per episode",
        description="Completions of one episode.",
    )
    train_global_batch_size: int | None = Field(
        default=256,
        ge=1,
        title="Samples per training step",
        description="Samples of one optimizer step.",
    )
    eval_episode_interval: int = Field(
        default=10,
        ge=0,
        title="Evaluate every … episodes",
        description="Evaluate every N episodes.",
    )


class QuickstartConfig(EngineConfig):
    """What `rlhf-flows train quickstart` can be asked for."""

    form_first: ClassVar[tuple[str, ...]] = ("run_name", "runtime", "learning_rate")

    runtime: QuickstartRuntime = Field(default_factory=QuickstartRuntime)
    warmup_steps: int = Field(
        default=200, ge=1, title="Warm-up steps", description="Optimizer steps of the warm-up."
    )
    warmup_batch_size: int = Field(
        default=128,
        ge=1,
        title="Demonstrations per warm-up step",
        description="Demonstrations that one step of the warm-up learns from.",
    )
    warmup_learning_rate: float = Field(
        default=2e-3,
        gt=0,
        title="Warm-up learning rate",
        description="Peak of the learning rate of the warm-up; it falls to zero.",
    )
    learning_rate: float = Field(
        default=3e-4,
        gt=0,
        title="Learning rate of GRPO",
        description="Peak of the learning rate of GRPO, after the warm-up.",
    )
    trainer: BackendSettings = Field(
        default_factory=BackendSettings,
        title="Training on several processes",
        description="What trains, and on how many ranks.",
    )
    num_eval_prompts: int = Field(
        default=512,
        ge=1,
        le=2048,
        title="Held-out prompts",
        description="How many prompts of the evaluations, which are never trained on.",
    )
    sampler: Sampler = Field(
        default="auto",
        title="Sampler",
        description="What generates: vLLM where it is installed, else transformers.",
    )


def _warmup(config: QuickstartConfig, model: Path, run: str | None) -> SFTConfig:
    steps, batch = config.warmup_steps, config.warmup_batch_size
    return SFTConfig(
        run_name=run,
        store=config.store,
        cluster=config.cluster,
        log_level=config.log_level,
        runtime=SFTRuntime(
            num_episode=1,
            sample_per_episode=steps * batch,
            train_global_batch_size=batch,
            generation_batch_size=steps * batch,
            seed=config.runtime.seed,
            max_attempts=config.runtime.max_attempts,
        ),
        model=str(model),
        trainer=config.trainer,
        dataset=DatasetSettings(path="demonstrations of sort_digits"),
        optimizer=OptimizerSettings(
            learning_rate=config.warmup_learning_rate,
            schedule="cosine",
            warmup_steps=min(15, steps - 1),
            total_steps=steps,
            beta2=0.98,
            weight_decay=0.01,
        ),
    )


def _reinforcement(config: QuickstartConfig, model: Path, run: str | None) -> GRPOConfig:
    return GRPOConfig(
        run_name=run,
        store=config.store,
        cluster=config.cluster,
        models=config.models,
        log_level=config.log_level,
        runtime=GRPORuntime.model_validate(config.runtime.model_dump()),
        model=str(model),
        trainer=config.trainer,
        prompts=DatasetSettings(path="prompts of sort_digits"),
        reward=RewardSettings(function=REWARD),
        generation=GenerationSettings(max_new_tokens=sort_digits.MAX_NEW_TOKENS),
        # One engine step after another on fresh samples: the sampler's own logprobs serve as the
        # old ones, and save a pass.
        grpo=GRPOSettings(old_logprobs="behaviour"),
        optimizer=OptimizerSettings(
            learning_rate=config.learning_rate,
            schedule="linear",
            total_steps=REINFORCEMENT_STEPS,
            min_learning_rate=config.learning_rate / 10,
        ),
        micro_batch_tokens=8192,
        sampler=config.sampler,
        max_model_len=32,
    )


@dataclass(frozen=True, kw_only=True)
class _Quickstart(Recipe):
    """Two runs: the warm-up, then GRPO."""

    def check(self, config: QuickstartConfig) -> None:
        if config.run_name is not None:
            fill_in(config.run_name)
        open_probed_store(config)
        base = _base_model(config)
        sft_recipe.build(_warmup(config, base, None), dataset=sort_digits.demonstrations(1)).check()
        grpo_recipe.build(
            _reinforcement(config, base, None),
            prompts=sort_digits.training_prompts(1),
            eval_prompts=sort_digits.held_out_prompts(1),
        ).check()

    async def run(
        self,
        config: QuickstartConfig,
        /,
        *,
        progress: Progress | None = None,
        takeover: bool = False,
    ) -> RecipeResult:
        """Both in one flow run."""
        name = fill_in(_run_name(config) or new_run_name("quickstart"))

        @flow(name="quickstart", flow_run_name=name, persist_result=False)
        async def train() -> RecipeResult:
            """A small model learns to sort digits."""
            return await _train(config, name, progress=progress, takeover=takeover)

        with without_abort():
            result: RecipeResult = await train()
        return result


def _run_name(config: QuickstartConfig) -> str | None:
    """The name that was asked for; that of the warm-up means the same, to go on with it."""
    return None if config.run_name is None else config.run_name.removesuffix(WARMUP)


def _base_model(config: QuickstartConfig) -> Path:
    """Built where it is not there yet. Raises ConfigError for a model that is somebody else's."""
    if config.init_from is not None:
        raise ConfigError(
            f"the quickstart makes its own model, so it takes no init_from: `rlhf-flows train grpo"
            f" --init-from {config.init_from} prompts=FILE` goes on from a version of its run"
        )
    seed = config.runtime.seed
    return build_tiny_qwen2(
        cache_folder() / f"quickstart-model-{seed}",
        seed=seed,
        characters=sort_digits.CHARACTERS,
        max_position_embeddings=64,
    )


async def _train(
    config: QuickstartConfig, run_name: str, *, progress: Progress | None, takeover: bool
) -> RecipeResult:
    seed = config.runtime.seed
    base = _base_model(config)
    steps = config.warmup_steps * config.warmup_batch_size
    warmup = sft_recipe.build(
        _warmup(config, base, run_name + WARMUP),
        dataset=sort_digits.demonstrations(steps, seed=seed),
    )
    warm = await warmup.alearn(progress=progress, takeover=takeover)
    model = await asyncio.to_thread(
        exported_model,
        config.store.url,
        warm.run,
        version=warm.version,
        module="trainer",
        retry_budget_s=config.store.retry_budget_s,
    )
    reinforced = await grpo_recipe.build(
        _reinforcement(config, model, run_name),
        prompts=sort_digits.training_prompts(8192, seed=seed),
        eval_prompts=sort_digits.held_out_prompts(config.num_eval_prompts),
    ).alearn(progress=progress, takeover=takeover)
    return RecipeResult(
        recipe="quickstart",
        run=reinforced,
        sampler=describe_sampler(policy_class(config.sampler)),
        objective="exact",
        seconds=_summed({"warm-up": sum(warm.seconds.values())}, reinforced.seconds),
        next_steps=(
            f"rlhf-flows show {reinforced.run}{store_words(config)}",
            f"rlhf-flows train quickstart run_name={reinforced.run} runtime.num_episode="
            f"{config.runtime.num_episode + 10}{store_words(config, 'store.url=')}",
            f"rlhf-flows export {reinforced.run}{store_words(config)} --to my-model",
        ),
    )


def _summed(*parts: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds for part in parts for name, seconds in part.items()}


# Empty, not None: the form shows the fields at once, each with its default. Prefect makes the
# configuration of it when the flow is called.
_DEFAULTS: Any = {}


# Its deployment is `grpo/quickstart`: the flow that the quickstart is an example of.
@flow(
    name="grpo",
    description="A small model learns to sort digits: warm-up, then GRPO.",
    persist_result=False,
)
async def quickstart(
    config: QuickstartConfig = _DEFAULTS,
    defaults: str | None = None,
) -> None:
    """A small model learns to sort digits: warm-up, then GRPO.

    Args:
        defaults: Name of a block "RLHF Run Defaults": what the configuration leaves at its defaults
            is taken from there.
    """
    config = await apply_defaults(config, defaults)
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    name = named_by_flow_run(
        _run_name(config) or f"quickstart-{context.flow_run.id}", context.flow_run
    )
    await _train(config, name, progress=None, takeover=False)


RECIPE = _Quickstart(name="quickstart", description=OWN["quickstart"], config=QuickstartConfig)
