"""How patient the automations are, and whom they tell. Apart from them: the command line shows it
without Prefect.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

__all__ = ["DELIVERED", "Alerts", "Delays"]

DELIVERED = timedelta(minutes=10)
"""Within which a run's incidents are one message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """Of the automations that start crashed runs again."""

    restart_s: float = 25.0
    """Longer than a worker takes to report a crash for the second time: 12 s were seen."""
    heartbeat_s: float = 90.0
    """Three heartbeats (`heartbeat.EVERY_S`)."""
    crashes_per_hour: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Alerts:
    """Which automations tell a person or pause a deployment. None leaves those that are there."""

    notify: str | None = None
    """A notification block, `type/name`; "" for nobody any more."""
    pause: bool | None = None
    """Whether deployments are paused whose runs are stopped by guard rails, or fail and fail."""
    failures_a_week: int = 3
