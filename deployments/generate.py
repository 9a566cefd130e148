"""Completions of a file of prompts, scored where a reward is given; nothing is trained.

An evaluation and nothing else: its shards are Parquet in the store as those of any run, a killed
run goes on with what is missing, and the same rows may be written as JSON lines, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.data.arrow import from_parquet
from rlhf_flows.deployments.fields import SamplingFields
from rlhf_flows.deployments.recipe import OWN, EngineRecipe
from rlhf_flows.deployments.rewards import ask_reward, reward_module
from rlhf_flows.engines import EvalEngine
from rlhf_flows.errors import ConfigError
from rlhf_flows.flow import RunResult
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.store import open_store

__all__ = ["RECIPE", "GenerateConfig", "build", "generate"]

_INTERNAL = frozenset({"group", "prompt_row", "seed", "policy_version", "sibling"})
"""Columns of the Parquet files that say nothing of a text."""


class GenerateRuntime(RuntimeConfig):
    """The loop of `RuntimeConfig`, of which nothing is trained."""

    form_first: ClassVar[tuple[str, ...]] = (
        "eval_num_inference_per_prompt",
        "generation_batch_size",
        "seed",
    )


class GenerateConfig(SamplingFields):
    """What `rlhf-flows train generate` can be asked for. `runtime.eval_num_inference_per_prompt` is
    the number of completions of a prompt, `runtime.generation_batch_size` that of a shard.
    """

    runtime: GenerateRuntime = Field(
        default_factory=GenerateRuntime,
        title="Course of the run",
        description="How many completions each prompt has, and how they are cut into shards.",
    )
    reward: RewardSettings | None = Field(
        default=None, description="Scores the completions: a function, or another source."
    )
    output: str | None = Field(
        default=None,
        title="File for the completions",
        description="A new file of JSON lines for the completions; they are in Parquet in any"
        " case.",
    )


def build(config: GenerateConfig) -> EvalEngine:
    """The engine that the configuration describes."""
    if config.output is not None:
        _check_output(Path(config.output))
    models: list[BaseModule] = [config.policy()]
    if config.reward is not None:
        models.append(reward_module(config))
    engine = EvalEngine(models, name="generate")
    engine.set_dataset(config.prompts.path)
    engine.configure(config)
    return engine


def _check_output(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"output={str(file)!r} is there already: name another file, or remove it")
    if not file.absolute().parent.is_dir():
        raise ConfigError(
            f"output={str(file)!r} would lie in {file.parent}, which is no folder: name a file in a"
            " folder that is there"
        )


def _ask(config: GenerateConfig) -> None:
    if config.reward is not None:
        ask_reward(config)


def _write(config: GenerateConfig, result: RunResult) -> None:
    """The completions as JSON lines, in the order of the prompts; whole, or not there."""
    if config.output is None:
        return
    file = Path(config.output)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    store = open_store(config.store.url)
    try:
        with part.open("w", encoding="utf-8") as lines:
            for key in result.evaluated[result.version]:
                for row in _rows(from_parquet(store.get(key))):
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _rows(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    columns = {
        name: values.tolist() if hasattr(values, "tolist") else list(values)
        for name, values in batch.items()
        if name not in _INTERNAL
    }
    # Ragged columns are tokens and what belongs to each: they stay in the Parquet files.
    texts = {n: v for n, v in columns.items() if not any(hasattr(x, "tolist") for x in v)}
    for i in range(len(batch["sample_id"])):
        yield {name: values[i] for name, values in texts.items()}


def _next(config: GenerateConfig, result: RunResult) -> Sequence[str]:
    if "://" in config.store.url:
        return ()
    pattern = f"{config.store.url}/{result.run}/evaluations/*/*/*.parquet"
    return (f"duckdb -c \"SELECT prompt, completion FROM '{pattern}'\"",)


RECIPE = EngineRecipe(
    name="generate",
    description=OWN["generate"],
    config=GenerateConfig,
    build=build,
    ask=_ask,
    finish=_write,
    next_steps=_next,
)
generate = RECIPE.flow()
