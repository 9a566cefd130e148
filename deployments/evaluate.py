"""Old versions of a run on held-out prompts, made up for afterwards; or a model as it is.

A backfill: what the run evaluated itself, or an earlier backfill did, on the same prompts in the
same way, is read and not done again. The results lie among the run's own evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from rlhf_flows.config import EngineConfig, RuntimeConfig
from rlhf_flows.config_loading import merge_settings
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.evaluated_run import EvaluatedRun, read_run, versions_of
from rlhf_flows.deployments.fields import SamplingFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe
from rlhf_flows.deployments.rewards import ask_reward, reward_module
from rlhf_flows.engines import EvalEngine
from rlhf_flows.errors import ConfigError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.samplers import Sampler
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.registry import load_module
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.tasks.backfill import Backfill

__all__ = ["RECIPE", "EvaluateConfig", "EvaluateRuntime", "build", "evaluate"]

_FREE_OF_REWARD = frozenset(
    {"url", "token_env", "timeout_s", "retries", "request_size", "max_concurrency", "memory_mb",
     "environment", "on_failure", "failure_reward"}
)  # fmt: skip
"""Fields that a run may change when it is resumed, so they name no other evaluation."""


class EvaluateRuntime(RuntimeConfig):
    """What an evaluation is cut into; by default as the run has it."""

    eval_num_inference_per_prompt: PositiveInt | None = Field(  # type: ignore[assignment]
        default=None, description="Completions of one prompt; as the run has it, else 1."
    )
    generation_batch_size: PositiveInt | None = Field(
        default=None, description="Completions of one shard; as the run has it."
    )
    seed: int | None = Field(  # type: ignore[assignment]
        default=None, ge=0, lt=2**31, description="Of what is drawn; as the run has it, else 0."
    )


class EvaluateConfig(EngineConfig):
    """What `rlhf-flows train evaluate` can be asked for. `run_name` is that of the evaluating run
    and need not be given: what is there is found in the run that is evaluated.
    """

    form_first = ("run", "versions", "step", "prompts", "reward", "generation", "runtime")

    run: str | None = Field(
        title="Run to evaluate",
        default=None,
        description="The run of this store whose versions are evaluated.",
    )
    versions: str | int | list[int] = Field(
        title="Versions to evaluate",
        default="all",
        description="Which: a list such as [0, 5, 10], a range such as 0-10 or 5-, newest, or all."
        " 0 is the model that the run began with.",
    )
    step: PositiveInt = Field(
        title="Every Nth version", default=1, description="Of a range, every Nth version."
    )
    module: str | None = Field(
        title="Module to evaluate",
        default=None,
        description="Which trained module, where the run trains several policies.",
    )
    model: str | None = Field(
        title="Model folder in place of a run",
        default=None,
        description="In place of a run: a local Hugging Face folder, or run:NAME@VERSION.",
    )
    prompts: DatasetSettings | None = Field(
        title="Held-out prompts",
        default=None,
        description="Held-out prompts; by default the run's own.",
    )
    reward: RewardSettings | None = Field(
        title="What scores the answers",
        default=None,
        description="What scores completions; by default the run's own.",
    )
    generation: GenerationSettings | None = Field(
        title="How answers are sampled",
        default=None,
        description="How the policy samples; by default as in the run's evaluations.",
    )
    sampler: Sampler | None = Field(
        title="Program that samples",
        default=None,
        description="What samples; by default the run's own.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        title="Number format of the weights",
        default=None,
        description="Of all weights; by default as in the run.",
    )
    max_model_len: int | None = Field(
        title="Most tokens of prompt and answer",
        default=None,
        ge=2,
        description="Most tokens of prompt and completion; by default as in the run.",
    )
    chat_template: bool | None = Field(
        title="Chat template",
        default=None,
        description="Render prompts by the chat template; by default as in the run.",
    )
    runtime: EvaluateRuntime = Field(default_factory=EvaluateRuntime)

    @model_validator(mode="after")
    def _check_subject(self) -> Self:
        if (self.run is None) == (self.model is None):
            raise ValueError(
                "an evaluation is of a run or of a model: give run=NAME, or model=FOLDER with"
                " prompts"
            )
        if self.run is None and self.prompts is None:
            raise ValueError("setting 'prompts' is missing: a model alone has no held-out prompts")
        return self


class Evaluation(SamplingFields):
    """The same with nothing left open."""

    run: str | None = None
    versions: str | int | list[int] = "all"
    step: int = 1
    module: str | None = None
    reward: RewardSettings | None = None

    def way(self) -> dict[str, Any]:
        """All that makes the results what they are, beside prompts, number of samples and seed."""
        reward = None if self.reward is None else self.reward.model_dump(mode="json")
        if isinstance(reward, dict):
            reward = {k: v for k, v in reward.items() if k not in _FREE_OF_REWARD}
        return {
            "generation": self.generation.model_dump(mode="json"),
            "reward": reward,
            **{n: getattr(self, n) for n in ("sampler", "dtype", "max_model_len", "chat_template")},
            "dataset": [self.prompts.type, self.prompts.args],
            "arguments": {n: m.args_dict for n, m in sorted(self.models.items()) if m.args_dict},
            "module": self.module,
            "shard": self.runtime.samples_per_shard,
        }


_FIELDS = (
    "model", "prompts", "reward", "generation", "sampler", "dtype", "max_model_len",
    "chat_template", "models", "imports",
)  # fmt: skip


def resolved(config: EvaluateConfig, run: EvaluatedRun | None) -> Evaluation:
    """What was asked for, over what the run does itself. Raises ConfigError."""
    asked = config.model_dump(mode="json", exclude_none=True, exclude={"runtime"})
    fields = {} if run is None else run.settings()
    for name in _FIELDS:
        if name not in asked:
            continue
        if name == "models":
            merge_settings(fields.setdefault("models", {}), asked["models"])
        elif name == "generation" and config.generation is not None:
            # One field of it is said, the others stay the run's.
            said = config.generation.model_dump(mode="json", exclude_unset=True)
            fields["generation"] = {**fields.get("generation", {}), **said}
        elif name == "imports":
            fields["imports"] = list(dict.fromkeys([*fields.get("imports", ()), *asked["imports"]]))
        else:
            fields[name] = asked[name]
    if "prompts" not in fields:
        raise ConfigError(
            f"run {config.run!r} was given no held-out prompts by its configuration: name some with"
            " prompts=FILE"
        )
    common = {n: v for n, v in asked.items() if n in EngineConfig.model_fields and n not in fields}
    named = ("run", "versions", "step")
    about: dict[str, Any] = {n: asked[n] for n in named if n in asked}
    about["module"] = None if run is None else run.module
    return Evaluation.model_validate(
        {**common, **fields, **about, "runtime": _runtime(config.runtime, run)}
    )


def _runtime(asked: EvaluateRuntime, run: EvaluatedRun | None) -> dict[str, Any]:
    """Whole: a seed and shards of the run where none are asked for."""
    usual = RuntimeConfig() if run is None else run.runtime()
    of_run = {
        "seed": usual.seed,
        "eval_num_inference_per_prompt": usual.eval_num_inference_per_prompt,
        "generation_batch_size": None if run is None else usual.samples_per_shard,
    }
    found = {**asked.model_dump(mode="json"), "sync_frequency": 1}
    found |= {name: value for name, value in of_run.items() if found[name] is None}
    # A shard is no larger than an episode, and there is none here.
    shard = found["generation_batch_size"] or found["sample_per_episode"]
    return {**found, "sample_per_episode": max(shard, found["sample_per_episode"])}


def build(config: EvaluateConfig) -> EvalEngine:
    """The engine that the configuration describes. Reads the run's record. Raises UserError."""
    run = None if config.run is None else read_run(config.store, config.run, config.module)
    asked = resolved(config, run)
    for module in asked.imports:
        load_module(module, asked_by=f"the module {module!r} of `imports`")
    models: list[BaseModule] = [asked.policy()]
    if asked.reward is not None:
        models.append(reward_module(asked))
    engine = EvalEngine(models, name="evaluate").set_dataset(asked.prompts.path)
    if run is not None:
        engine.set_backfill(_backfill(config, asked, run))
    return engine.configure(asked)


def _backfill(config: EvaluateConfig, asked: Evaluation, run: EvaluatedRun) -> Backfill:
    versions = versions_of(run, config.versions, step=config.step)
    left = tuple(v for v in versions if v not in run.deleted)
    if not left:
        raise ConfigError(
            f"the weights of versions {_listed(versions)} of run {run.name!r} were deleted by"
            " retention: evaluate newer ones, and raise runtime.keep_last or set runtime.keep_every"
            " in runs to come"
        )
    # The run's own way, whatever its own prompts are: they are a part of the name by themselves.
    plain = EvaluateConfig(run=run.name, prompts=asked.prompts, store=config.store)
    own = resolved(plain, run)
    usual = {**own.way(), "dataset": _types(run)}
    return Backfill(
        run=run.name,
        versions=left,
        left_out=tuple(v for v in versions if v in run.deleted),
        module=run.module,
        settings=None if asked.way() == usual else asked.way(),
    )


def _types(run: EvaluatedRun) -> list[Any]:
    """Type and arguments of the run's own held-out prompts, or of its prompts."""
    found = run.settings().get("prompts") or run.config.get("prompts") or {}
    return [found.get("type"), found.get("args", {})] if isinstance(found, dict) else [None, {}]


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions))


def _ask(config: EvaluateConfig) -> None:
    run = None if config.run is None else read_run(config.store, config.run, config.module)
    asked = resolved(config, run)
    if asked.reward is not None:
        ask_reward(asked)


RECIPE = EngineRecipe(
    name="evaluate",
    description=OWN["evaluate"],
    config=EvaluateConfig,
    build=build,
    ask=_ask,
)
evaluate = RECIPE.flow()
