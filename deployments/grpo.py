"""GRPO: a policy that samples, a reward function, a trainer; a reference where there is a KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_flows.config import EngineConfig, RuntimeConfig
from rlhf_flows.data.rows import load_rows
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.policy_role import GeneratingPolicy
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.samplers import Sampler, policy_class
from rlhf_flows.settings import GRPOSettings, OptimizerSettings

__all__ = ["RECIPE", "GRPOConfig", "GRPORuntime", "build", "check_reward", "grpo"]


class GRPORuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`, with a group size that GRPO can learn from."""

    num_inference_per_prompt: int = Field(
        default=8, ge=1, description="Completions of one prompt: the group size, at least 2."
    )


class GRPOConfig(EngineConfig):
    """What `rlhf-flows train grpo` can be asked for."""

    model: str = Field(description="A local Hugging Face folder: model and tokenizer.")
    prompts: DatasetSettings = Field(
        description="A JSONL, JSON or Parquet file of rows with `prompt` (text or chat messages);"
        " other columns go to the reward function. With `type`, of whatever that takes."
    )
    eval_prompts: DatasetSettings | None = Field(
        default=None, description="Held-out prompts; of the type of `prompts` if they say none."
    )
    reward: str = Field(description="`package.module:function`, importable from here.")
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
    policy = _policy(config)
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
    reward = FunctionReward("reward", function=config.reward)
    engine = GRPOEngine(policy, trainer, reward, reference, name=name).configure(config)
    engine.set_dataset(config.prompts.path if prompts is None else prompts)
    held_out = eval_prompts
    if held_out is None and config.eval_prompts is not None:
        held_out = config.eval_prompts.path
    return engine if held_out is None else engine.set_eval_dataset(held_out)


def _policy(config: GRPOConfig) -> GeneratingPolicy:
    return policy_class(config.sampler)(
        "policy",
        path=config.model,
        generation=config.generation,
        eval_generation=config.eval_generation,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        chat_template=config.chat_template,
        dataset=config.prompts.type,
        dataset_args=config.prompts.args,
        eval_dataset=None if config.eval_prompts is None else config.eval_prompts.type,
        eval_dataset_args=None if config.eval_prompts is None else config.eval_prompts.args,
    )


def check_reward(function: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Asks the reward function for an empty completion of the first row, before anything starts.

    Raises:
        RewardError: it raises, or returns what is no reward; with the row and the cause.
    """
    row = rows[0]
    sample = {name: [value] for name, value in row.items()}
    FunctionReward("reward", function=function).forward_step(
        {**sample, "prompt": [str(row.get("prompt", ""))], "completion": [""], "seed": [0]}
    )


def _ask(config: GRPOConfig) -> None:
    policy = _policy(config)
    rows: Sequence[Any] = load_rows(config.prompts.path, fields=policy.row_fields())[:1]
    if config.prompts.type is not None:  # the reward function sees what that makes of a row
        rows = [policy.build_dataset(rows)[0]]
    check_reward(config.reward, rows)


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (
        f"rlhf-flows export {result.run}{store_words(config)} --to model",
        "prefect server start   # then the flow run's page, at the address it prints",
    )


RECIPE = EngineRecipe(
    name="grpo", description=OWN["grpo"], config=GRPOConfig, build=build, ask=_ask, next_steps=_next
)
grpo = RECIPE.flow()
