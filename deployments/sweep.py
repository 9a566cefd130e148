"""A sweep: one recipe over a grid of settings, each point a run with a name of its own.

The decision here: the store remembers the grid (`NAME/sweep.json`), and a point's run is what is
asked for what it came to. So the same command goes on with what is missing, on whichever machine,
and a table needs nothing but the name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_flows.config_loading import load_config, read_settings
from rlhf_flows.deployments.recipe import Recipe
from rlhf_flows.errors import ConfigError, ObjectNotFoundError
from rlhf_flows.store import (
    ObjectStore,
    RunLayout,
    check_run_name,
    commit_json,
    newest_attempt,
    read_json,
    scan,
)

__all__ = ["Point", "Sweep", "deployment_of", "is_complete", "parse_grid", "plan_sweep", "remember"]

_MOST_POINTS = 999
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a sweep."""

    run: str
    settings: Mapping[str, str]
    """What the grid says of it: dotted key -> value as it was written."""
    words: tuple[str, ...]
    """All that `rlhf-flows train RECIPE` is given for it, but the file and the name."""
    config: Any
    """The same as a configuration, with the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A grid and its points, in order."""

    name: str
    recipe: str
    grid: Mapping[str, tuple[str, ...]]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "recipe": self.recipe,
            "grid": {key: list(values) for key, values in self.grid.items()},
            "points": [{"run": p.run, "settings": dict(p.settings)} for p in self.points],
        }


def parse_grid(words: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Words of one value each, and the grid: `key=a,b,c` has three, `key=[1,2]` is one list.

    Raises ConfigError for a word that is no setting, an empty value, or a key that stands twice.
    """
    single: list[str] = []
    grid: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for word in words:
        key, sep, text = word.partition("=")
        if not sep or not key:
            raise ConfigError(f"{word!r} is no setting: write it as key=value or key=value,value")
        if key in seen:
            raise ConfigError(f"{key!r} stands twice: write its values as {key}=a,b")
        seen.add(key)
        values = tuple(value.strip() for value in _split(text))
        if len(values) == 1:
            single.append(word)
            continue
        if not all(values):
            raise ConfigError(f"{word!r} has an empty value: write values as {key}=a,b,c")
        if len(set(values)) < len(values):
            raise ConfigError(f"{word!r} has a value twice: each point of a sweep is another run")
        grid[key] = values
    return single, grid


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def plan_sweep(
    recipe: Recipe, words: Sequence[str], *, file: Path | None = None, name: str | None = None
) -> Sweep:
    """Every point, its configuration loaded. Nothing is looked at beside the file.

    Args:
        name: Of the sweep, and the beginning of its runs' names; by default one that says what is
            asked for, so that the same command names the same sweep.

    Raises:
        ConfigError: there is no grid, or a setting of one of its points is wrong.
    """
    single, grid = parse_grid(words)
    if not grid:
        raise ConfigError(
            "a sweep needs a setting with several values, such as optimizer.learning_rate=1e-5,3e-5"
        )
    if any(key == "run_name" or key.startswith("store.") or key == "store" for key in grid):
        raise ConfigError(
            "a sweep has one store, and names its runs itself: give --name, and one store.url"
        )
    combinations = list(itertools.product(*grid.values()))
    if len(combinations) > _MOST_POINTS:
        raise ConfigError(
            f"the grid has {len(combinations)} points, {_MOST_POINTS} at most: leave values out"
        )
    name = check_run_name(name or _name(recipe.name, single, grid, file))
    points = []
    for number, values in enumerate(combinations, start=1):
        settings = dict(zip(grid, values, strict=True))
        run = check_run_name(f"{name}-{number:03d}")
        of_grid = [f"{key}={value}" for key, value in settings.items()]
        point = (*single, *of_grid)
        config = load_config(recipe.config, [*point, f"run_name={json.dumps(run)}"], file=file)
        points.append(Point(run=run, settings=settings, words=point, config=config))
    return Sweep(name=name, recipe=recipe.name, grid=grid, points=tuple(points))


def _name(
    recipe: str, single: Sequence[str], grid: Mapping[str, Sequence[str]], file: Path | None
) -> str:
    asked = {
        "words": sorted(single),
        "grid": {key: list(values) for key, values in grid.items()},
        "file": None if file is None else read_settings(file),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    return f"{recipe}-sweep-{digest.hexdigest()[:8]}"


def sweep_key(name: str) -> str:
    return f"{check_run_name(name)}/sweep.json"


def remember(store: ObjectStore, sweep: Sweep) -> None:
    """Writes the grid, once. Raises ConfigError where the name is of another sweep, or of a run."""
    if scan(store, sweep.name).exists:
        raise ConfigError(f"{sweep.name!r} is a run of {store.url}: give the sweep another --name")
    there = commit_json(store, sweep_key(sweep.name), sweep.to_json()).payload
    for field in ("recipe", "grid"):
        if there[field] != sweep.to_json()[field]:
            raise ConfigError(
                f"the sweep {sweep.name!r} of {store.url} has another {field}:"
                f" {_shown(there[field])} then, {_shown(sweep.to_json()[field])} now; give this one"
                " another --name, or ask for the same again to go on"
            )


def _shown(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=200)).strip()


def is_complete(store: ObjectStore, run: str, *, num_episode: int) -> bool:
    """Whether nothing is left to do of a run: its last attempt said so, and it is long enough."""
    try:
        ended = read_json(store, RunLayout(run).attempt_ended(newest_attempt(store, run)))
    except ObjectNotFoundError:
        return False  # it was not begun, or its newest attempt has not come to an end
    trained = scan(store, run).trained_episodes
    if ended["outcome"] != "completed":
        return False
    return trained == 0 or trained >= num_episode  # 0: of a recipe that trains nothing


def deployment_of(recipe: str) -> str:
    """The deployment of `prefect.yaml` that runs a recipe of ours."""
    if recipe == "quickstart":
        return "grpo/quickstart"
    return f"{recipe}/{'run' if recipe in ('generate', 'evaluate') else 'train'}"
