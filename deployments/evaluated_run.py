"""A run whose versions are to be evaluated: how it samples and rewards itself, what is there of it.

The decision here: whatever is not asked for otherwise is as the run has it, so that an evaluation
made afterwards is the one that the run would have made, by the same name in the store. What does
differ becomes a part of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_flows.backfill import versions_deleted
from rlhf_flows.config import RuntimeConfig, StoreConfig
from rlhf_flows.errors import ConfigError, ObjectNotFoundError
from rlhf_flows.store import RunLayout, check_run_name, open_store, read_json, scan

__all__ = ["EvaluatedRun", "read_run", "versions_of"]

_RANGE = re.compile(r"(?P<first>\d+)?\s*-\s*(?P<last>\d+)?")
_SAMPLING = ("sampler", "dtype", "max_model_len", "chat_template")
_POLICIES = ("trainer", "ppo_policy", "policy")
"""What the recipes call the module that learns to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedRun:
    """A run of the store, as its configuration and one listing say."""

    name: str
    config: Mapping[str, Any]
    """As `run.json` has it."""
    newest: int
    """The newest policy version."""
    deleted: frozenset[int]
    """Versions whose weights retention has deleted."""
    module: str
    """The trained module whose versions these are."""

    def settings(self) -> dict[str, Any]:
        """The fields of an evaluation as the run does them itself, in the form of a file; without
        `prompts` where its configuration names no held-out ones.
        """
        config = self.config
        if not isinstance(config.get("model"), str):
            raise ConfigError(
                f"the configuration of run {self.name!r} names no `model`, so its policy is none of"
                " a recipe: evaluate it by engine.evaluate() of the program that trained it"
            )
        found = {name: config[name] for name in _SAMPLING if name in config}
        found |= {"model": config["model"], "imports": config.get("imports", [])}
        generation = config.get("eval_generation") or config.get("generation")
        found |= {} if generation is None else {"generation": generation}
        found |= {} if config.get("reward") is None else {"reward": config["reward"]}
        held_out = config.get("eval_prompts")
        if held_out is not None:
            found["prompts"] = _of_the_same_type(held_out, config.get("prompts"))
        models = config.get("models", {})
        # Param sync happens before each evaluation here.
        found["models"] = {
            name: {**models[name], "sync_frequency": None}
            for name in ("policy", "reward")
            if name in models
        }
        return found

    def runtime(self) -> RuntimeConfig:
        """The loop of the run itself: its seed, its shards."""
        known = RuntimeConfig.model_fields.keys()
        given = self.config.get("runtime", {})
        return RuntimeConfig.model_validate({n: v for n, v in given.items() if n in known})


def read_run(store: StoreConfig, run: str, module: str | None) -> EvaluatedRun:
    """Reads the run's record and lists it. Raises ConfigError where it cannot be evaluated."""
    opened = open_store(store.url, retry_budget_s=store.retry_budget_s)
    state, layout = scan(opened, check_run_name(run)), RunLayout(run)
    if not state.exists:
        raise ConfigError(f"there is no run {run!r} in {opened.url}: `rlhf-flows ls` lists them")
    checkpoints: Mapping[str, Any] = {}
    if state.trained_episodes:
        checkpoints = read_json(opened, layout.trained(state.trained_episodes - 1))["checkpoints"]
    chosen = _module(run, checkpoints, module)
    if chosen in checkpoints:
        try:
            about = opened.get(f"{checkpoints[chosen]['weights']['prefix']}/config.json")
        except ObjectNotFoundError:
            about = b"{}"
        kinds = json.loads(about).get("architectures") or ["ForCausalLM"]
        if not any("CausalLM" in kind for kind in kinds):
            raise ConfigError(
                f"run {run!r} trains {chosen!r}, a {kinds[0]}, which writes no completions: name a"
                " run that trains a policy"
            )
    return EvaluatedRun(
        name=run,
        config=read_json(opened, layout.run_json)["config"],
        newest=state.trained_episodes,
        deleted=frozenset(versions_deleted(run, state)),
        module=chosen,
    )


def versions_of(run: EvaluatedRun, asked: str | int | Sequence[int], *, step: int = 1) -> list[int]:
    """The versions that are asked for and that the run has, in order; deleted ones among them.

    Args:
        asked: "all", "newest", a range with both ends ("0-10"), an open one ("5-", "-5"), one
            version, or a list of them.
        step: Of a range, every `step`-th version from its first on.

    Raises:
        ConfigError: it is none of these, or names a version that the run has not come to.
    """
    if isinstance(asked, str) and asked.strip().isdigit():
        asked = int(asked)
    if isinstance(asked, str) and "," in asked:
        asked = [int(v) if v.strip().isdigit() else -1 for v in asked.split(",")]
    if not isinstance(asked, str):
        named = sorted({asked} if isinstance(asked, int) else set(asked))
        if not named or named[0] < 0 or named[-1] > run.newest:
            raise ConfigError(
                f"versions={asked!r}: run {run.name!r} has versions 0 to {run.newest}; name some of"
                " them, a range such as 0-10 or 5-, or all"
            )
        return named
    text = asked.strip().lower()
    if text == "newest":
        return [run.newest]
    found = _RANGE.fullmatch("0-" if text == "all" else text)
    if found is None or text == "-":
        raise ConfigError(
            f"versions={asked!r} is no version: write a list such as [0, 5, 10], a range such as"
            " 0-10 or 5-, newest, or all"
        )
    first, last = int(found["first"] or 0), int(found["last"] or run.newest)
    if first > last or first > run.newest:
        raise ConfigError(
            f"versions={asked!r} holds no version of run {run.name!r}, which has 0 to {run.newest}"
        )
    return list(range(first, min(last, run.newest) + 1, step))


def _module(run: str, checkpoints: Mapping[str, Any], asked: str | None) -> str:
    """Which trained module's weights are evaluated."""
    if asked is not None and (asked in checkpoints or not checkpoints):
        return asked
    if not checkpoints:
        return _POLICIES[0]  # nothing is trained yet: version 0 needs none
    known = [name for name in _POLICIES if name in checkpoints] or list(checkpoints)
    if asked is not None or (len(known) > 1 and len(checkpoints) > 1):
        raise ConfigError(
            f"run {run!r} trains {', '.join(checkpoints)}: say with module=... which of them is to"
            " be evaluated"
        )
    return known[0]


def _of_the_same_type(held_out: Any, prompts: Any) -> dict[str, Any]:
    """Held-out prompts are of the type of the others where they say none."""
    asked = {"path": held_out} if isinstance(held_out, str) else dict(held_out)
    usual = prompts if isinstance(prompts, Mapping) else {}
    if asked.get("type") is None and usual.get("type") is not None:
        asked |= {"type": usual["type"], "args": usual.get("args", {})}
    return asked
