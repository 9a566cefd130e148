"""The loop over episodes as settings: how many samples, what is kept, what is waited for.

The decision here: what contradicts itself is refused as it is read, with numbers that would do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from rlhf_flows.guard_settings import StopIf
from rlhf_flows.settings import Settings

__all__ = ["RuntimeConfig"]


class RuntimeConfig(Settings):
    """The loop over episodes. Names and meanings are ChatLearn's where it has them."""

    form_first: ClassVar[tuple[str, ...]] = (
        "num_episode",
        "sample_per_episode",
        "num_inference_per_prompt",
        "train_global_batch_size",
        "eval_episode_interval",
        "seed",
    )
    form_needs: ClassVar = {"stream_data_loader_type": (("dynamic",), "max_relay_episode")}

    num_episode: PositiveInt = Field(
        default=10,
        title="Number of episodes",
        description="Rounds of sampling and training in the whole run.",
    )
    sample_per_episode: PositiveInt = Field(
        default=512,
        title="Completions per episode",
        description="Completions of one episode, a multiple of those of one prompt.",
    )
    num_inference_per_prompt: PositiveInt = Field(
        default=1,
        title="Completions per prompt",
        description="Completions of one prompt: the group size.",
    )
    generation_batch_size: PositiveInt | None = Field(
        default=None,
        title="Completions per shard",
        description="Samples of one shard, whole groups; by default the episode in one.",
    )
    train_global_batch_size: PositiveInt | None = Field(
        default=None,
        title="Samples per training step",
        description="Samples of one optimizer step, a divisor of those of an episode; by default"
        " the whole episode.",
    )
    train_micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="Samples of one forward and backward pass; by default the module decides.",
    )
    train_micro_batch_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens of one forward and backward pass, in place of a number of samples.",
    )
    num_training_epoch: PositiveInt = Field(
        default=1,
        title="Passes over an episode's samples",
        description="Passes over an episode's samples.",
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Versions a sampler may lag behind: 0 is on-policy, 1 overlaps.",
    )
    sync_frequency: PositiveInt = Field(default=1, description="Sync parameters every N episodes.")
    save_episode_interval: PositiveInt = Field(
        default=1, description="Full training state every N episodes; weights are kept for each."
    )
    keep_last: PositiveInt = Field(default=2, description="Training states and weights kept.")
    keep_every: PositiveInt | None = Field(
        default=None,
        description="Every Nth version is kept for good, weights and training state; none by"
        " default.",
    )
    keep_best: int = Field(
        default=0,
        ge=0,
        description="As many versions of those with the best keep_best_metric are kept, too.",
    )
    keep_best_metric: str = Field(
        default="reward",
        description="Of a version's evaluation, where the run has an evaluator; else of the"
        " training that led to it.",
    )
    keep_best_is: Literal["highest", "lowest"] = Field(
        default="highest", description="Which value of keep_best_metric is best."
    )
    eval_episode_interval: int = Field(
        default=0,
        ge=0,
        title="Evaluate every … episodes",
        description="Evaluate every N episodes, where there are held-out prompts; 0 never.",
    )
    eval_num_inference_per_prompt: PositiveInt = Field(
        default=1,
        title="Completions per prompt, in evaluations",
        description="Completions of one prompt in an evaluation.",
    )
    enable_eval_before_training: bool = Field(default=True, description="Evaluate version 0, too.")
    data_path: str | list[str] | None = Field(
        default=None,
        description="The prompts, where set_dataset was not called: a file, or several that are"
        " mixed by data_ratio.",
    )
    data_ratio: list[PositiveInt] | None = Field(
        default=None,
        description="Shares of several datasets in an episode, such as [2, 1]; equal by default.",
    )
    data_shuffle: bool = Field(default=True, description="Shuffle the prompts anew each epoch.")
    training_shuffle_mode: Literal["sample", "batch"] = Field(
        default="sample",
        description="What is shuffled for training, with data_shuffle: samples (whole groups), or"
        " batches of neighbours.",
    )
    stream_data_loader_type: Literal["fixed", "dynamic"] = Field(
        default="fixed",
        description="Whether training takes the planned samples, or as many as the relay function"
        " returns.",
    )
    max_relay_episode: int = Field(
        default=0,
        ge=-1,
        description="How many of the last episodes, this one among them, the relay function is"
        " shown; -1 all, 0 none: it is not asked.",
    )
    relay_episode_offset: int = Field(
        default=0, ge=0, description="The first episode that the relay function is asked for."
    )
    colocation: list[list[str]] = Field(
        default_factory=list,
        description="Groups of modules that share their GPUs, each in one group at most.",
    )
    cpu_schedule_strategy: Literal["SPREAD", "PACK"] = Field(
        default="PACK",
        description="Whether processes without a GPU are spread over the nodes of a cluster.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        title="Random seed",
        description="Seed of everything random in the run.",
    )
    setup_timeout_s: float = Field(
        default=600.0, gt=0, description="For a module to load its model."
    )
    shard_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="For one module call on a shard. On top of this and of the next two comes what"
        " a worker may wait for a store that is away, store.retry_budget_s.",
    )
    train_timeout_s: float = Field(default=3600.0, gt=0, description="For one optimizer step.")
    sync_timeout_s: float = Field(
        default=600.0, gt=0, description="For the weights to reach a replica."
    )
    collective_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a rank waits in a collective for the others of its replica, which is"
        " replaced then. Longer than store.retry_budget_s, which one of them may wait meanwhile.",
    )
    sync_bucket_bytes: PositiveInt = Field(
        default=128 << 20, description="Bytes of one sync bucket."
    )
    sync_probe: bool = Field(
        default=True, description="Compare logprobs of probe sequences between trainer and sampler."
    )
    max_attempts: PositiveInt = Field(
        default=5,
        description="Attempts in a row that may die (killed, crashed, machine lost) before the run"
        " stays failed.",
    )
    max_replica_restarts: int = Field(
        default=3,
        ge=0,
        description="Deaths of one replica before its pool fails, nothing finished in between.",
    )
    new_prompts: Literal["refuse", "take"] = Field(
        default="refuse",
        description="What becomes of a run that is resumed with other prompts than it was planned"
        " on: it is refused, or it takes them from the first episode on that is not trained.",
    )
    max_quarantined: int = Field(
        default=8,
        ge=0,
        description="Samples of one episode that may be left out, each with its group, because"
        " they end or hang their worker again and again; one more stops the run.",
    )
    stop_if: StopIf = Field(
        default_factory=StopIf,
        description="Guard rails: when the run stops by itself, with the reason.",
    )

    @field_validator("colocation", mode="before")
    @classmethod
    def _groups(cls, value: Any) -> Any:
        """A group is a list of names, or one text with commas, as ChatLearn writes it."""
        if not isinstance(value, list):
            return value
        return [
            [name.strip() for name in group.split(",")] if isinstance(group, str) else group
            for group in value
        ]

    @model_validator(mode="after")
    def _check_colocation(self) -> Self:
        names = [name for group in self.colocation for name in group]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"runtime.colocation names {name!r} {names.count(name)} times: a module shares"
                    " its GPUs with the modules of one group"
                )
        return self

    @model_validator(mode="after")
    def _check_micro_batches(self) -> Self:
        micro, batch = self.train_micro_batch_size, self.samples_per_batch
        if micro is not None and self.train_micro_batch_tokens is not None:
            raise ValueError(
                "runtime.train_micro_batch_size and runtime.train_micro_batch_tokens are both"
                " given: a micro-batch is cut by one of them, so leave the other out"
            )
        if micro is not None and batch % micro:
            raise ValueError(
                f"the training batch of {batch} samples (runtime.train_global_batch_size) is not a"
                f" multiple of runtime.train_micro_batch_size={micro}: take"
                f" {_divisor_below(batch, micro, 1)}"
            )
        return self

    @model_validator(mode="after")
    def _check_relay(self) -> Self:
        if self.relay_episode_offset and not self.max_relay_episode:
            raise ValueError(
                "runtime.relay_episode_offset is given, but no episode is relayed: set"
                " runtime.max_relay_episode, to -1 for all"
            )
        if self.stream_data_loader_type == "dynamic" and not self.max_relay_episode:
            raise ValueError(
                "runtime.stream_data_loader_type is dynamic, but nothing changes the number of"
                " samples: set runtime.max_relay_episode, and a relay function on the engine"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        group = self.num_inference_per_prompt
        for name in ("sample_per_episode", "generation_batch_size", "train_global_batch_size"):
            value = getattr(self, name)
            if value is not None and value % group:
                raise ValueError(
                    f"runtime.{name}={value} is not a multiple of runtime.num_inference_per_prompt"
                    f"={group}: samples of one prompt stay together, so take"
                    f" {max(1, value // group) * group}"
                )
        batch = self.train_global_batch_size
        if batch is not None and batch > self.sample_per_episode:
            raise ValueError(
                f"runtime.train_global_batch_size={batch} is more than"
                f" runtime.sample_per_episode={self.sample_per_episode}: lower the first"
            )
        if batch is not None and self.sample_per_episode % batch:
            raise ValueError(
                f"runtime.sample_per_episode={self.sample_per_episode} is not a multiple of"
                f" runtime.train_global_batch_size={batch}: an optimizer step would be short, so"
                f" take batches of {_divisor_below(self.sample_per_episode, batch, group)}"
            )
        return self

    @property
    def samples_per_batch(self) -> int:
        return self.train_global_batch_size or self.sample_per_episode

    @property
    def samples_per_shard(self) -> int:
        return min(self.generation_batch_size or self.sample_per_episode, self.sample_per_episode)


def _divisor_below(number: int, most: int, multiple: int) -> int:
    """The largest divisor of `number` that is a multiple of `multiple`, at most `most`."""
    found = (d for d in range(min(most, number), 0, -1) if number % d == 0 and d % multiple == 0)
    return next(found, number)
