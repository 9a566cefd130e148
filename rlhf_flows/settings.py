"""Settings of the algorithms and optimizers: what a recipe's configuration is built from.

The decision here: a formula's variants are fields of one frozen model, never flags read somewhere
below; what contradicts itself is refused when the object is made. Imports pydantic alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_flows.form_schema import ALL_SETTINGS, shape_form, starts_empty

__all__ = [
    "BackendSettings",
    "DPOSettings",
    "GRPOSettings",
    "OptimizerSettings",
    "PPOSettings",
    "PolicySettings",
    "RewardModelSettings",
    "SFTSettings",
    "Settings",
]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown fields refused, NaN and infinity refused.

    The class variables say how its fields look in Prefect's form (form_schema.py).
    """

    form_first: ClassVar[tuple[str, ...]] = ()
    """The fields that come first: of a section, those that are shown until all are asked for."""
    form_last: ClassVar[tuple[str, ...]] = ()
    """The fields that come last."""
    form_needs: ClassVar[Mapping[str, tuple[tuple[str, ...], str]]] = {}
    """By field: values of it that need another field, and which. Checked before a run starts."""
    form_text: ClassVar[str | None] = None
    """What a text that may stand in place of the fields is called."""
    form_title: ClassVar[str] = ALL_SETTINGS
    """What the fields together are called, beside other views of them."""

    @staticmethod
    def _shape(schema: dict[str, Any], model: type[BaseModel]) -> None:
        assert issubclass(model, Settings)
        shape_form(
            schema, model, first=model.form_first, last=model.form_last, needs=model.form_needs
        )
        schema["title"] = model.form_title

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        json_schema_extra=_shape,
    )


class OptimizerSettings(Settings):
    """AdamW with a schedule whose horizon is frozen when the run starts."""

    form_first: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "schedule",
        "total_steps",
        "warmup_steps",
    )
    form_needs: ClassVar = {"schedule": (("linear", "cosine"), "total_steps")}

    learning_rate: float = Field(
        default=1e-5, gt=0, title="Learning rate", description="Peak learning rate."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first beta.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's second beta.")
    eps: float = Field(
        default=1e-8,
        gt=0,
        title="Epsilon",
        description="AdamW's epsilon, which keeps it from dividing by zero.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Clip gradients to this global norm; null: never."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        title="Schedule of the learning rate",
        description="Course of the learning rate after the warm-up.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        title="Warm-up steps",
        description="Optimizer steps of linear warm-up from zero.",
    )
    total_steps: int | None = Field(
        default=None,
        ge=1,
        title="Steps of the schedule",
        description="Optimizer steps of the whole run, warm-up included: the horizon of a linear"
        " or cosine schedule, never changed once the run exists.",
    )
    min_learning_rate: float = Field(
        default=0.0, ge=0, description="Where a linear or cosine schedule ends."
    )
    master_weights: bool = Field(
        default=False,
        description="Keep float32 copies of bfloat16 weights for the optimizer: small updates are"
        " not rounded away, for 4 more bytes per parameter and float32 moments.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(
                f"schedule={self.schedule!r} needs total_steps: a schedule must know its end"
                " before it starts"
            )
        if self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves nothing of total_steps="
                f"{self.total_steps}: lower warmup_steps"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate="
                f"{self.learning_rate}"
            )
        return self


class BackendSettings(Settings):
    """What trains a model, and how its ranks share it. A backend of another kind (FSDP2,
    DeepSpeed) is one more name here, and a room beside Megatron's.
    """

    form_first: ClassVar[tuple[str, ...]] = ("backend",)

    backend: Literal["torch", "megatron"] = Field(
        default="torch",
        title="Training library",
        description="torch: each rank has the whole model; megatron: ranks share it"
        " (pip install rlhf-flows[megatron]).",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="megatron: ranks that share every layer."
    )
    pipeline_parallel: int = Field(
        default=1, ge=1, description="megatron: stages, each with a run of the layers."
    )
    virtual_pipeline: int = Field(
        default=1, ge=1, description="megatron: runs of layers of each stage, interleaved."
    )
    data_parallel: int | None = Field(
        default=None,
        ge=1,
        description="Whole models, each with its share of a batch; by default as many as the"
        " module's num_gpu or ranks_per_replica holds, else 1.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="megatron: tensor parallel ranks share the tokens where they do not share"
        " the layer.",
    )
    distributed_optimizer: bool = Field(
        default=False,
        description="megatron: data parallel ranks share what the optimizer keeps.",
    )

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        if self.backend == "torch":
            for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline"):
                if (found := getattr(self, name)) > 1:
                    raise ValueError(
                        f"{name}={found} cuts a model, which backend='torch' does not: take"
                        " backend='megatron', or leave it out"
                    )
            for name in ("sequence_parallel", "distributed_optimizer"):
                if getattr(self, name):
                    raise ValueError(f"{name} is Megatron's: take backend='megatron'")
        return self


class PolicySettings(Settings):
    """What the clipped policy losses of GRPO and PPO share."""

    form_needs: ClassVar = {"aggregation": (("fixed",), "max_length")}

    clip_low: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        title="Clip below",
        description="Ratios below 1 - clip_low earn nothing more.",
    )
    clip_high: float = Field(
        default=0.2,
        gt=0,
        title="Clip above",
        description="Ratios above 1 + clip_high earn nothing more; 0.28 in DAPO (2503.14476).",
    )
    aggregation: Literal["token", "sequence", "fixed"] = Field(
        default="token",
        description="Loss of the global batch: mean over tokens (DAPO), mean over sequences of"
        " their means over tokens (GRPO), or sum over samples x max_length (Dr. GRPO).",
    )
    max_length: int | None = Field(
        default=None, ge=1, description="The constant that aggregation='fixed' divides by."
    )
    importance: Literal["none", "token", "sequence"] = Field(
        default="none",
        description="Correct for the gap between sampler and trainer by truncated importance"
        " weights, per token or per sequence.",
    )
    importance_cap: float = Field(
        default=2.0, gt=0, description="Importance weights are truncated here."
    )
    old_logprobs: Literal["trainer", "behaviour"] = Field(
        default="trainer",
        description="The ratio's denominator: logprobs that the trainer computes when the phase"
        " starts, or the sampler's own (saves a pass when an episode has several updates).",
    )
    truncation: Literal["keep", "mask", "penalize"] = Field(
        default="keep",
        description="Completions cut off by the length limit: trained like all others, left out"
        " of the loss, or trained with truncation_penalty taken off their reward.",
    )
    truncation_penalty: float = Field(
        default=1.0, ge=0, description="Taken off the reward when truncation='penalize'."
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="The sampler's temperature, which it follows where it is left empty.",
        json_schema_extra=starts_empty,
    )
    early_stop_ratio: float | None = Field(
        default=None,
        gt=1,
        description="A global batch takes no step where the mean ratio of its tokens exceeds this"
        " (5 in ReaL); null: all take one.",
    )
    exact_entropy: bool = Field(
        default=False,
        description="Report the entropy over the whole vocabulary (one more pass over the logits)"
        " in place of the mean surprise of the sampled tokens, which estimates it for nothing.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.aggregation == "fixed" and self.max_length is None:
            raise ValueError(
                "aggregation='fixed' needs max_length: the constant that every sample's loss is"
                " divided by, usually the longest allowed completion"
            )
        if self.importance != "none" and self.old_logprobs == "behaviour":
            raise ValueError(
                f"importance={self.importance!r} corrects from behaviour to old logprobs, but"
                " old_logprobs='behaviour' makes them the same: set importance='none' or"
                " old_logprobs='trainer'"
            )
        return self


class GRPOSettings(PolicySettings):
    """GRPO (arXiv 2402.03300) and what others made of it, field by field."""

    form_first: ClassVar[tuple[str, ...]] = (
        "kl_coef",
        "advantage_normalization",
        "clip_low",
        "clip_high",
    )

    advantage_normalization: Literal["group", "batch", "none"] = Field(
        default="group",
        title="Advantages are divided by",
        description="What a sample's distance from its group's mean is divided by: the standard"
        " deviation of its group, of the global batch, or nothing (Dr. GRPO, arXiv 2503.20783).",
    )
    advantage_eps: float = Field(
        default=1e-4, gt=0, description="Added to the standard deviation that is divided by."
    )
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        title="KL weight",
        description="Weight of the KL to the reference in the loss; 0: none.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Schulman's estimators of the KL; k3 is GRPO's."
    )


class PPOSettings(PolicySettings):
    """PPO with the KL to the reference in the reward (InstructGPT, arXiv 2203.02155).

    The trainers of policy and value take the same settings: both make their targets from the same
    samples by the same rules.
    """

    form_first: ClassVar[tuple[str, ...]] = ("kl_coef", "adaptive_kl", "clip_low", "clip_high")

    kl_coef: float = Field(
        default=0.05,
        ge=0,
        description="Weight of the KL to the reference in each token's reward; with adaptive_kl"
        " that of the first episode.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1", description="Schulman's estimators of the KL; k1 is InstructGPT's."
    )
    adaptive_kl: bool = Field(
        default=False,
        title="Adapt the KL weight",
        description="Kl_coef rises after an episode whose divergence is above kl_target, and falls"
        " after one below (arXiv 1909.08593).",
    )
    kl_target: float = Field(
        default=6.0, gt=0, description="Of adaptive_kl: nats of a sample, mean over an episode."
    )
    kl_horizon: float = Field(
        default=10000.0,
        gt=0,
        description="Of adaptive_kl: samples; a larger one changes it slower.",
    )
    score_bias: float = Field(default=0.0, description="Taken off scores first.")
    score_scale: float = Field(default=1.0, gt=0, description="Scores are then multiplied by it.")
    score_clip: float | None = Field(
        default=None, gt=0, description="And bounded to plus and minus this; null: never."
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount of later rewards.")
    lambda_: float = Field(
        default=0.95,
        ge=0,
        le=1,
        title="Lambda",
        description="Of generalized advantage estimation: 0 trusts the value function, 1 the"
        " rewards alone.",
    )
    bootstrap_truncated: bool = Field(
        default=False,
        description="After the last token of a completion that the length limit cut off comes what"
        " the value model expects there, in place of nothing.",
    )
    whiten_advantages: bool = Field(
        default=True,
        description="Advantages of a global batch get mean 0 and standard deviation 1.",
    )
    value_clip: float | None = Field(
        default=0.2,
        gt=0,
        description="Values further than this from their old ones earn nothing more; null: never"
        " clipped. With value_norm it is of the normalized values.",
    )
    value_norm: Literal["none", "exp", "ma"] = Field(
        default="none",
        description="The value model learns returns less their running mean, divided by their"
        " running standard deviation: exponential, or over all tokens ever seen.",
    )
    value_norm_beta: float = Field(
        default=0.99995, ge=0, lt=1, description="Of value_norm='exp': what stays after a batch."
    )
    value_norm_eps: float = Field(
        default=1e-5, gt=0, description="Of value_norm: added to the variance."
    )

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        if self.adaptive_kl and self.kl_coef == 0:
            raise ValueError(
                "adaptive_kl multiplies kl_coef, and 0 stays 0: set kl_coef to where it is to"
                " begin, such as 0.1, or adaptive_kl=false"
            )
        return self


class _PairSettings(Settings):
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        title="Longest row (tokens)",
        description="Longest allowed prompt with one completion; a longer row is refused.",
    )
    append_eos: bool = Field(
        default=True,
        title="Append the end-of-text token",
        description="End every completion with the tokenizer's end-of-text token.",
    )


class RewardModelSettings(_PairSettings):
    """A reward model learnt from preferences (InstructGPT, arXiv 2203.02155, eq. 1)."""

    form_first: ClassVar[tuple[str, ...]] = ("max_tokens", "use_margin")

    use_margin: bool = Field(
        default=False,
        title="Use margins",
        description="Rows have a number `margin`: how much better the better completion is"
        " (Llama 2, arXiv 2307.09288).",
    )
    center_coef: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the squared sum of a pair's rewards, which keeps them near zero;"
        " 0.01 is usual (arXiv 2312.09244).",
    )


class DPOSettings(_PairSettings):
    """Direct preference optimization (arXiv 2305.18290), or IPO (arXiv 2310.12036)."""

    form_first: ClassVar[tuple[str, ...]] = ("kind", "beta", "max_tokens")

    beta: float = Field(
        default=0.1,
        gt=0,
        title="Beta: closeness to the reference",
        description="How dear it is to leave the reference; tau in IPO.",
    )
    kind: Literal["dpo", "ipo"] = Field(
        default="dpo",
        title="Loss",
        description="Logistic loss of the margin, or its distance from 1 / 2 beta.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Probability that a preference is wrong (cDPO)."
    )
    sft_coef: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean negative log-likelihood of the better completion's tokens,"
        " which keeps it likely (arXiv 2404.19733, eq. 2); 0.1 to 1 is usual.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Online, the sampler's temperature, which it follows where it is left empty.",
        json_schema_extra=starts_empty,
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.kind == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} belongs to kind='dpo': IPO is bounded"
                " without it, so leave it out"
            )
        return self


class SFTSettings(Settings):
    """Supervised fine-tuning on the completion tokens of demonstrations."""

    form_first: ClassVar[tuple[str, ...]] = ("max_tokens",)

    aggregation: Literal["token", "sequence"] = Field(
        default="token", description="Loss of the global batch: mean over tokens or sequences."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        title="Longest row (tokens)",
        description="Longest allowed prompt with completion; a longer row is refused.",
    )
    append_eos: bool = Field(
        default=True,
        title="Append the end-of-text token",
        description="End every completion with the tokenizer's end-of-text token.",
    )
