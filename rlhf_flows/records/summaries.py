"""The runs of a store, a line each: how far they are, how the last attempt ended, where from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_flows.store import ObjectStore, RunLayout, read_json, scan_keys

__all__ = ["RunSummary", "summarize_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run."""

    run: str
    recipe: str
    """The name of its engine."""
    created_at: str
    """UTC, ISO 8601."""
    episodes: int
    """Trained."""
    num_episode: int
    """Asked for, by the newest attempt."""
    attempts: int
    outcome: str | None
    """Of the newest attempt; None where it has not ended, or died."""
    parent: str | None
    """`RUN@VERSION` whose weights it began from."""


def summarize_runs(store: ObjectStore) -> list[RunSummary]:
    """Every run of a store, in the order of their names; one listing, three reads a run at most."""
    keys: dict[str, list[str]] = {}
    for info in store.list():
        run, _, below = info.key.partition("/")
        if below:
            keys.setdefault(run, []).append(info.key)
    return [
        _summary(store, run, keys[run]) for run in sorted(keys) if f"{run}/run.json" in keys[run]
    ]


def _summary(store: ObjectStore, run: str, keys: list[str]) -> RunSummary:
    layout, state = RunLayout(run), scan_keys(run, keys)
    record = read_json(store, layout.run_json)
    config: dict[str, Any] = record["config"]
    num_episode, outcome = config["runtime"]["num_episode"], None
    if state.attempts:
        newest = state.attempts[-1]
        changed = read_json(store, layout.attempt(newest))["changed"]
        num_episode = changed.get("runtime.num_episode", num_episode)
        if layout.attempt_ended(newest) in keys:
            outcome = read_json(store, layout.attempt_ended(newest))["outcome"]
    parent = config.get("parent")
    return RunSummary(
        run=run,
        recipe=config["recipe"],
        created_at=record["created_at"],
        episodes=state.trained_episodes,
        num_episode=num_episode,
        attempts=len(state.attempts),
        outcome=outcome,
        parent=f"{parent['run']}@{parent['version']}" if parent else None,
    )
