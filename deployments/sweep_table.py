"""What the runs of a sweep came to, from what they left in the store; the best one first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from rlhf_flows.deployments.sweep import sweep_key
from rlhf_flows.errors import ConfigError, ObjectNotFoundError
from rlhf_flows.store import ObjectStore, RunLayout, RunState, read_json, scan

__all__ = ["draw_table", "sweep_rows"]

_BEST = (("reward", True), ("accuracy", True), ("loss", False))
"""What a sweep is ranked by where nothing is said: the first that its runs have, and whether more
of it is better."""
_SHOWN = ("reward", "kl", "loss", "accuracy")


def sweep_rows(
    store: ObjectStore, name: str, *, by: str | None = None, lowest: bool | None = None
) -> list[dict[str, Any]]:
    """One row a run: `run`, `settings`, `state`, `episodes`, `metrics`, `seconds`, `ranked_by`.

    Metrics are those of the newest evaluation where there is one, over those of the last training
    (so that `kl` is there, too). `seconds` is the time of all attempts that came to an end.

    Args:
        by: The metric that says which is best; by default the reward, else accuracy, else loss.
        lowest: Whether less of it is better; by default of names that end with "loss" and "kl".

    Raises:
        ConfigError: there is no such sweep, or no run of it has that metric.
    """
    try:
        sweep = read_json(store, sweep_key(name))
    except ObjectNotFoundError:
        raise ConfigError(f"there is no sweep {name!r} in {store.url}") from None
    rows = [_row(store, point["run"], point["settings"]) for point in sweep["points"]]
    known = sorted({metric for row in rows for metric in row["metrics"]})
    if by is None:
        by = next((metric for metric, _ in _BEST if metric in known), "")
    elif known and by not in known:
        raise ConfigError(f"no run of sweep {name!r} has {by!r}: they have {', '.join(known)}")
    if lowest is None:
        lowest = by.endswith(("loss", "kl"))
    sign = 1.0 if lowest else -1.0

    def rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        value = row["metrics"].get(by, math.nan)
        return math.isnan(value), 0.0 if math.isnan(value) else sign * value, row["run"]

    return [{**row, "ranked_by": by} for row in sorted(rows, key=rank)]


def _row(store: ObjectStore, run: str, settings: Mapping[str, str]) -> dict[str, Any]:
    state, layout = scan(store, run), RunLayout(run)
    metrics: dict[str, float] = {}
    if state.trained_episodes:
        metrics |= read_json(store, layout.trained(state.trained_episodes - 1))["metrics"]
    done = [which for which, found in state.evaluations.items() if found.done]
    # An older evaluation says nothing of what was trained since.
    newest = max((version for version, _ in done), default=-1)
    if newest == state.trained_episodes:
        digest = next(digest for version, digest in done if version == newest)
        metrics |= read_json(store, layout.evaluation_done(newest, digest))["metrics"]
    outcome, seconds = _attempts(store, layout, state)
    return {
        "run": run,
        "settings": dict(settings),
        "state": outcome,
        "episodes": state.trained_episodes,
        "metrics": metrics,
        "seconds": seconds,
    }


def _attempts(store: ObjectStore, layout: RunLayout, state: RunState) -> tuple[str, float]:
    """How the newest attempt ended, and the seconds of all that did."""
    outcome, seconds = "waiting", 0.0
    for number in state.attempts:
        try:
            ended = read_json(store, layout.attempt_ended(number))
        except ObjectNotFoundError:
            outcome = "not ended"
            continue
        began = read_json(store, layout.attempt(number))
        outcome = ended["outcome"]
        times = (datetime.fromisoformat(t) for t in (ended["ended_at"], began["started_at"]))
        end, start = times
        seconds += (end - start).total_seconds()
    return outcome, seconds


def draw_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same for people."""
    keys = list(rows[0]["settings"])
    by = rows[0]["ranked_by"]
    shown = dict.fromkeys(m for m in (by, *_SHOWN) if any(m in row["metrics"] for row in rows))
    table = Table("run", *keys, *shown, "episodes", "seconds", "state", title=f"sweep {name}")
    for row in rows:
        table.add_row(
            row["run"],
            *(row["settings"][key] for key in keys),
            *(f"{row['metrics'][m]:.4f}" if m in row["metrics"] else "" for m in shown),
            str(row["episodes"]),
            f"{row['seconds']:.0f}",
            row["state"],
        )
    return table
