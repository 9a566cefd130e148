"""PPO: a policy that samples, a reward, a value model, and the trainers of policy and value.

The value starts from the reward model where there is one (InstructGPT, arXiv 2203.02155), else from
the policy's own model with a new head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.deployments.fields import ReinforcementFields
from rlhf_flows.deployments.model_folders import MODEL, model_folder
from rlhf_flows.deployments.recipe import OWN, EngineRecipe, store_words
from rlhf_flows.deployments.rewards import ask_reward, reward_module
from rlhf_flows.engines import RLHFEngine
from rlhf_flows.flow import RunResult
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.value_model import ValueModel
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.settings import OptimizerSettings, PPOSettings

__all__ = ["RECIPE", "PPOConfig", "build", "ppo"]


class PPORuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`: one completion of each prompt, several steps an episode."""

    num_inference_per_prompt: int = Field(
        default=1,
        ge=1,
        title="Completions per prompt",
        description="Completions of one prompt; PPO compares none, so 1 will do.",
    )


class PPOConfig(ReinforcementFields):
    """What `rlhf-flows train ppo` can be asked for."""

    runtime: PPORuntime = Field(default_factory=PPORuntime)
    ppo: PPOSettings = Field(
        default_factory=PPOSettings,
        title="PPO",
        description="How far a step may go, and what leaving the reference model costs.",
    )
    value_model: str | None = Field(
        default=None,
        description="What the value starts from; by default the reward model, or else the model."
        f" {MODEL}",
    )
    value_optimizer: OptimizerSettings | None = Field(
        default=None, description="Of the value; that of the policy by default."
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature is 0: PPO learns from what sampling varies; 1.0 is usual"
            )
        self.check_temperature("ppo", self.ppo)
        return self


def build(config: PPOConfig) -> RLHFEngine:
    """The engine that the configuration describes."""
    settings = config.ppo.model_copy(update={"temperature": config.generation.temperature})
    value = config.value_model or config.reward.model or config.model
    value_path = model_folder(value, config.store)
    engine = RLHFEngine(
        config.policy(eval_generation=config.eval_generation, eval_prompts=config.eval_prompts),
        Reference(
            "reference",
            path=config.folder,
            temperature=config.generation.temperature,
            dtype=config.dtype,
        ),
        reward_module(config),
        ValueModel("value", path=value_path, ppo=settings, dtype=config.dtype),
        on_backend(PPOPolicyTrainer, "ppo_policy", ppo=settings, **config.trainer_arguments),
        on_backend(
            ValueTrainer,
            "ppo_value",
            ppo=settings,
            **{
                **config.trainer_arguments,
                "path": value_path,
                "optimizer": config.value_optimizer or config.optimizer,
            },
        ),
        name="ppo",
        reference_ema=config.reference_ema,
    ).configure(config)
    engine.set_dataset(config.prompts.path)
    if config.eval_prompts is not None:
        engine.set_eval_dataset(config.eval_prompts.path)
    return engine


def _next(config: Any, result: RunResult) -> Sequence[str]:
    return (
        f"rlhf-flows export {result.run}{store_words(config)} --module ppo_policy --to model",
        f"rlhf-flows train generate model=run:{result.run}/ppo_policy"
        f" prompts={config.prompts.path}{store_words(config, 'store.url=')}",
    )


RECIPE = EngineRecipe(
    name="ppo",
    description=OWN["ppo"],
    config=PPOConfig,
    build=build,
    ask=ask_reward,
    next_steps=_next,
)
ppo = RECIPE.flow()
