"""How patient the automations are. Apart from them: the command line shows it without Prefect."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Delays"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """Of the automations that start crashed runs again."""

    restart_s: float = 25.0
    """Longer than a worker takes to report a crash for the second time: 12 s were seen."""
    heartbeat_s: float = 90.0
    """Three heartbeats (`heartbeat.EVERY_S`)."""
    crashes_per_hour: int = 10
