"""GRPO: a policy that samples, a reward, a trainer; a reference where there is a KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.deployments.fields import ReinforcementFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.deployments.rewards import ask_reward, reward_module
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.settings import GRPOSettings

__all__ = ["RECIPE", "GRPOConfig", "GRPORuntime", "build", "grpo"]


class GRPORuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`, with a group size that GRPO can learn from."""

    num_inference_per_prompt: int = Field(
        default=8,
        ge=1,
        title="Completions per prompt",
        description="Completions of one prompt: the group size, at least 2.",
    )


class GRPOConfig(ReinforcementFields):
    """What `rlhf-flows train grpo` can be asked for."""

    runtime: GRPORuntime = Field(default_factory=GRPORuntime)
    grpo: GRPOSettings = Field(
        default_factory=GRPOSettings,
        title="GRPO",
        description="How completions of one prompt are compared, and how far a step may go.",
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
        if self.reference_ema is not None and not self.grpo.kl_coef:
            raise ValueError(
                "reference_ema moves a reference, and with grpo.kl_coef=0 there is none: give"
                " grpo.kl_coef, or leave reference_ema out"
            )
        self.check_temperature("grpo", self.grpo)
        return self


def build(
    config: GRPOConfig,
    *,
    prompts: Any = None,
    eval_prompts: Any = None,
    name: str = "grpo",
) -> GRPOEngine:
    """The engine that the configuration describes; rows may be given in place of files."""
    temperature = config.generation.temperature
    settings = config.grpo.model_copy(update={"temperature": temperature})
    reference = None
    if settings.kl_coef:
        reference = Reference(
            "reference", path=config.folder, temperature=temperature, dtype=config.dtype
        )
    engine = GRPOEngine(
        config.policy(eval_generation=config.eval_generation, eval_prompts=config.eval_prompts),
        on_backend(PolicyTrainer, "trainer", grpo=settings, **config.trainer_arguments),
        reward_module(config),
        reference,
        name=name,
        reference_ema=config.reference_ema,
    ).configure(config)
    engine.set_dataset(config.prompts.path if prompts is None else prompts)
    held_out = eval_prompts
    if held_out is None and config.eval_prompts is not None:
        held_out = config.eval_prompts.path
    return engine if held_out is None else engine.set_eval_dataset(held_out)


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (
        f"rlhf-flows export {result.run}{store_words(config)} --to model",
        "prefect server start   # then the flow run's page, at the address it prints",
    )


RECIPE = EngineRecipe(
    name="grpo",
    description=OWN["grpo"],
    config=GRPOConfig,
    build=build,
    ask=ask_reward,
    next_steps=_next,
)
grpo = RECIPE.flow()
