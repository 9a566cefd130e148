"""GRPO: a policy that samples, a reward, a trainer; a reference where there is a KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from prefect import flow
from pydantic import Field, model_validator

from rlhf_flows.config import EngineConfig, RuntimeConfig
from rlhf_flows.data.rows import load_rows
from rlhf_flows.deployments.recipe import Recipe, RecipeResult, store_words
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.reward_sources import build_reward, check_reward
from rlhf_flows.models.samplers import Sampler, describe_sampler, policy_class
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.settings import GRPOSettings, OptimizerSettings
from rlhf_flows.tasks.progress import Progress

__all__ = ["RECIPE", "GRPOConfig", "GRPORuntime", "build", "check_reward", "grpo"]


class GRPORuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`, with a group size that GRPO can learn from."""

    num_inference_per_prompt: int = Field(
        default=8, ge=1, description="Completions of one prompt: the group size, at least 2."
    )


class GRPOConfig(EngineConfig):
    """What `rlhf-flows train grpo` can be asked for."""

    model: str = Field(description="A local Hugging Face folder: model and tokenizer.")
    prompts: str = Field(
        description="A JSONL, JSON or Parquet file of rows with `prompt` (text or chat messages);"
        " other columns go to the reward."
    )
    eval_prompts: str | None = Field(
        default=None, description="Held-out prompts, in the same form."
    )
    reward: RewardSettings = Field(
        description="What scores completions: `package.module:function`, importable from here, or"
        " one of reward.function, model, classifier, command, url and interface."
    )
    runtime: GRPORuntime = Field(default_factory=GRPORuntime)
    generation: GenerationSettings = Field(
        default_factory=GenerationSettings, description="How the policy samples."
    )
    eval_generation: GenerationSettings | None = Field(
        default=None, description="How it samples in evaluations; the same by default."
    )
    grpo: GRPOSettings = Field(default_factory=GRPOSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of all weights.")
    sampler: Sampler = Field(default="auto", description="vLLM where it is installed.")
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of prompt and completion; the model's limit if none.",
    )
    micro_batch_tokens: int = Field(default=4096, ge=1, description="Tokens of one training pass.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, a third more time."
    )
    chat_template: bool | None = Field(
        default=None,
        description="Render prompts by the chat template; by default chat messages only.",
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.runtime.num_inference_per_prompt < 2:
            raise ValueError(
                "runtime.num_inference_per_prompt is 1: GRPO compares completions of one prompt"
                " with each other, so it needs at least 2"
            )
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature is 0: all completions of a prompt would be the same, and"
                " GRPO would have nothing to compare; 1.0 is usual"
            )
        asked = "temperature" in self.grpo.model_fields_set
        if asked and self.grpo.temperature != self.generation.temperature:
            raise ValueError(
                f"grpo.temperature={self.grpo.temperature} is not generation.temperature="
                f"{self.generation.temperature}: leave the first out, it follows the second"
            )
        return self


def build(
    config: GRPOConfig,
    *,
    prompts: Any = None,
    eval_prompts: Any = None,
    name: str = "grpo",
) -> GRPOEngine:
    """The engine that the configuration describes; rows may be given in place of files."""
    path = Path(config.model)
    policy = policy_class(config.sampler)(
        "policy",
        path=path,
        generation=config.generation,
        eval_generation=config.eval_generation,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        chat_template=config.chat_template,
    )
    settings = config.grpo.model_copy(update={"temperature": config.generation.temperature})
    trainer = PolicyTrainer(
        "trainer",
        path=path,
        optimizer=config.optimizer,
        grpo=settings,
        micro_batch_tokens=config.micro_batch_tokens,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    reference = None
    if settings.kl_coef:
        reference = Reference(
            "reference", path=path, temperature=config.generation.temperature, dtype=config.dtype
        )
    reward = build_reward(config.reward, policy_path=path, dtype=config.dtype)
    engine = GRPOEngine(policy, trainer, reward, reference, name=name).configure(config)
    engine.set_dataset(config.prompts if prompts is None else prompts)
    held_out = config.eval_prompts if eval_prompts is None else eval_prompts
    return engine if held_out is None else engine.set_eval_dataset(held_out)


def _check(config: GRPOConfig) -> None:
    build(config).check()
    check_reward(config.reward, load_rows(config.prompts))


async def run(
    config: GRPOConfig, /, *, progress: Progress | None = None, takeover: bool = False
) -> RecipeResult:
    result = await build(config).alearn(progress=progress, takeover=takeover)
    return RecipeResult(
        recipe="grpo",
        run=result,
        sampler=describe_sampler(policy_class(config.sampler)),
        seconds=result.seconds,
        next_steps=(
            f"rlhf-flows show {result.run}{store_words(config)}",
            f"rlhf-flows export {result.run}{store_words(config)} --to model",
            "prefect server start   # then the flow run's page, at the address it prints",
        ),
    )


@flow(name="grpo", persist_result=False)
async def grpo(config: GRPOConfig) -> None:
    """Reinforcement by GRPO on prompts with a reward function."""
    await run(config)


RECIPE = Recipe(name="grpo", config=GRPOConfig, check=_check, run=run)
