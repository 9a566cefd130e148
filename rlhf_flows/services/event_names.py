"""Names of the events that runs emit, and what their payloads hold; docs/alerts.md has the table.

Apart from what emits them: automations match by these names without torch or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["FIELDS", "FINISHED", "INCIDENT", "INCIDENTS", "RUN", "STARTED"]

RUN = "rlhf-flows.run."
"""What the resource of a run begins with; its name follows."""
STARTED = "rlhf-flows.phase.started"
FINISHED = "rlhf-flows.phase.finished"
INCIDENT = "rlhf-flows.incident."
"""What the event of an incident begins with; its kind follows."""

INCIDENTS: Mapping[str, str] = {
    "quarantine": "a sample is left out, with its group, because it ends or hangs its worker",
    "actor-restart": "a replica died and is replaced",
    "shard-repair": "a damaged shard is made again",
    "stall": "work is waited for since a minute or longer",
    "sync-fallback": "weights did not come from the trainer and are read from the store",
    "reward-collapse": "the reward fell far below that of the episodes before",
    "kl-blow-up": "the KL divergence is many times that of the episodes before",
    "nan": "a metric of the training is NaN or infinite, and the run goes on",
    "guard-rail": "a guard rail stopped the run",
}
"""Kinds of incidents, and what each says."""

FIELDS: Mapping[str, Sequence[str]] = {
    STARTED: ("phase", "episode or version"),
    FINISHED: ("phase", "episode or version", "seconds", "metrics"),
    f"{INCIDENT}quarantine": ("sample", "phase", "module", "episode or version"),
    f"{INCIDENT}actor-restart": ("pool", "replica", "deaths"),
    f"{INCIDENT}shard-repair": ("shard", "generation"),
    f"{INCIDENT}stall": ("pool", "seconds"),
    f"{INCIDENT}sync-fallback": ("pool", "replica", "version"),
    f"{INCIDENT}reward-collapse": ("episode", "metric", "value", "limit"),
    f"{INCIDENT}kl-blow-up": ("episode", "metric", "value", "limit"),
    f"{INCIDENT}nan": ("episode", "metrics"),
    f"{INCIDENT}guard-rail": (
        "setting",
        "episode",
        "first_bad_episode",
        "version",
        "last_good_version",
        "values",
    ),
}
"""Of each event, what its payload holds besides `run`, and of an incident `what`, its words."""
