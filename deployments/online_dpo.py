"""Online DPO: the policy samples, a reward ranks, the best is set against the worst
(arXiv 2402.04792).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.deployments.fields import ReinforcementFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.deployments.rewards import ask_reward, reward_module
from rlhf_flows.engines import OnlineDPOEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.online_dpo_trainer import OnlineDPOTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.settings import DPOSettings

__all__ = ["RECIPE", "OnlineDPOConfig", "build", "online_dpo"]


class OnlineDPORuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`, with groups of which one can be the best."""

    num_inference_per_prompt: int = Field(
        default=4,
        ge=2,
        title="Completions per prompt",
        description="Completions of one prompt, at least 2: best against worst.",
    )


class OnlineDPOConfig(ReinforcementFields):
    """What `rlhf-flows train online_dpo` can be asked for."""

    runtime: OnlineDPORuntime = Field(default_factory=OnlineDPORuntime)
    dpo: DPOSettings = Field(
        default_factory=DPOSettings,
        title="DPO",
        description="What the model learns from a pair of completions.",
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature is 0: all completions of a prompt would be the same, and"
                " none the best; 1.0 is usual"
            )
        self.check_temperature("dpo", self.dpo)
        return self


def build(config: OnlineDPOConfig) -> OnlineDPOEngine:
    """The engine that the configuration describes."""
    temperature = config.generation.temperature
    settings = config.dpo.model_copy(update={"temperature": temperature})
    engine = OnlineDPOEngine(
        config.policy(eval_generation=config.eval_generation, eval_prompts=config.eval_prompts),
        Reference("reference", path=config.folder, temperature=temperature, dtype=config.dtype),
        reward_module(config),
        on_backend(OnlineDPOTrainer, "trainer", dpo=settings, **config.trainer_arguments),
        name="online_dpo",
        reference_ema=config.reference_ema,
    ).configure(config)
    engine.set_dataset(config.prompts.path)
    if config.eval_prompts is not None:
        engine.set_eval_dataset(config.eval_prompts.path)
    return engine


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (f"rlhf-flows export {result.run}{store_words(config)} --to model",)


RECIPE = EngineRecipe(
    name="online_dpo",
    description=OWN["online_dpo"],
    config=OnlineDPOConfig,
    build=build,
    ask=ask_reward,
    next_steps=_next,
)
online_dpo = RECIPE.flow()
