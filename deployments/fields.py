"""What the configurations of several recipes have in common, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlhf_flows.config import EngineConfig
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.model_folders import MODEL, model_folder
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.policy_role import GeneratingPolicy
from rlhf_flows.models.samplers import Sampler, policy_class
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.settings import BackendSettings, DPOSettings, OptimizerSettings, PolicySettings

__all__ = ["ModelFields", "ReinforcementFields", "SamplingFields", "TrainingFields"]


class ModelFields(EngineConfig):
    """A model, in a precision."""

    form_first: ClassVar[tuple[str, ...]] = ("model", "run_name", "runtime")

    model: str = Field(title="Model", description=MODEL)
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        title="Precision of the weights",
        description="Number format of all weights; bfloat16 takes half the memory.",
    )
    chat_template: bool | None = Field(
        default=None,
        description="Render prompts by the chat template; by default chat messages only.",
    )

    @property
    def folder(self) -> Path:
        """Where the model lies. Raises ConfigError."""
        return model_folder(self.model, self.store)


class TrainingFields(ModelFields):
    """What every trainer of a causal model takes."""

    form_first: ClassVar[tuple[str, ...]] = ("model", "dataset", "run_name", "runtime", "optimizer")

    trainer: BackendSettings = Field(
        default_factory=BackendSettings,
        title="Training on several processes",
        description="What trains, and on how many ranks.",
    )
    optimizer: OptimizerSettings = Field(
        default_factory=OptimizerSettings,
        title="Optimizer",
        description="How fast the model learns: AdamW and the course of its learning rate.",
    )
    micro_batch_tokens: int = Field(
        default=4096,
        ge=1,
        title="Tokens per training pass",
        description="Most tokens of one forward and backward pass: lower it where memory is short.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, a third more time."
    )

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Of `on_backend`, beside the kind of trainer, its name and the algorithm's settings."""
        return {
            "backend": self.trainer,
            "path": self.folder,
            "optimizer": self.optimizer,
            "micro_batch_tokens": self.micro_batch_tokens,
            "dtype": self.dtype,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


class SamplingFields(ModelFields):
    """What a recipe takes that samples completions of prompts."""

    form_first: ClassVar[tuple[str, ...]] = (
        "model",
        "prompts",
        "reward",
        "output",
        "run_name",
        "generation",
        "runtime",
    )

    prompts: DatasetSettings = Field(
        title="Prompts",
        description="A JSONL, JSON or Parquet file of rows with `prompt` (text or chat"
        " messages), by path or URL; other columns go to the reward. With `type`, of"
        " whatever that takes.",
    )
    generation: GenerationSettings = Field(
        default_factory=GenerationSettings, title="Sampling", description="How the policy samples."
    )
    sampler: Sampler = Field(
        default="auto",
        title="Sampler",
        description="What generates: vLLM where it is installed, else transformers.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        title="Longest prompt and completion (tokens)",
        description="Most tokens of prompt and completion; the model's limit if none.",
    )

    def policy(
        self,
        *,
        eval_generation: GenerationSettings | None = None,
        eval_prompts: DatasetSettings | None = None,
    ) -> GeneratingPolicy:
        """The module that samples, by the name of "policy"."""
        return policy_class(self.sampler)(
            "policy",
            path=self.folder,
            generation=self.generation,
            eval_generation=eval_generation,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            chat_template=self.chat_template,
            dataset=self.prompts.type,
            dataset_args=self.prompts.args,
            eval_dataset=None if eval_prompts is None else eval_prompts.type,
            eval_dataset_args=None if eval_prompts is None else eval_prompts.args,
        )


class ReinforcementFields(SamplingFields, TrainingFields):
    """What a recipe takes that samples, scores and trains."""

    form_first: ClassVar[tuple[str, ...]] = (
        *("model", "prompts", "reward", "run_name", "runtime", "generation", "optimizer"),
        *("grpo", "ppo", "dpo", "eval_prompts", "eval_generation"),
    )

    eval_prompts: DatasetSettings | None = Field(
        default=None,
        title="Held-out prompts",
        description="Held-out prompts; of the type of `prompts` if they say none.",
    )
    reward: RewardSettings = Field(
        title="Reward",
        description="What scores completions: a function of yours, `package.module:function`,"
        " that the worker can import; or one other source, such as a reward model.",
    )
    eval_generation: GenerationSettings | None = Field(
        default=None,
        title="Sampling in evaluations",
        description="How the policy samples in evaluations; the same by default.",
    )
    reference_ema: float | None = Field(
        default=None,
        gt=0,
        le=1,
        title="Reference follows the policy by",
        description="After each episode the reference moves this far towards the policy (eta of"
        " reference = eta * policy + (1 - eta) * reference); by default it stays as it is.",
    )

    def check_temperature(self, name: str, settings: PolicySettings | DPOSettings) -> None:
        """Raises ValueError where an algorithm is told another temperature than the sampler's."""
        asked = "temperature" in settings.model_fields_set
        if asked and settings.temperature != self.generation.temperature:
            raise ValueError(
                f"{name}.temperature={settings.temperature} is not generation.temperature="
                f"{self.generation.temperature}: leave the first out, it follows the second"
            )
