"""Names of runs by template: `nightly-{date}`, for schedules, whose every run is to have its own.

The decision here: a template is filled in from the flow run, its id and when it was expected to
start at first, never from the clock: a flow run that is retried, however much later, goes on with
the run that it began.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from string import Formatter
from typing import Protocol

from rlhf_flows.errors import ConfigError
from rlhf_flows.store import check_run_name

__all__ = ["FIELDS", "Started", "fill_in", "is_template", "named_by_flow_run", "new_run_name"]

FIELDS = {
    "date": "day of the start, 2026-11-30",
    "time": "time of day of the start, 031500",
    "id": "first 8 characters of the flow run's id",
}
"""What a template may hold, in braces; times are UTC."""


class Started(Protocol):
    """What a flow run says of itself."""

    @property
    def id(self) -> object: ...
    @property
    def expected_start_time(self) -> datetime | None: ...


def new_run_name(recipe: str) -> str:
    """A name that sorts by time, for a run that was given none."""
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def is_template(name: str | None) -> bool:
    """Whether the name has to be filled in."""
    return name is not None and ("{" in name or "}" in name)


def named_by_flow_run(name: str, flow_run: Started) -> str:
    """The name with its template filled in by the flow run that a person or a schedule started."""
    return fill_in(name, moment=flow_run.expected_start_time, id=str(flow_run.id))


def fill_in(name: str, *, moment: datetime | None = None, id: str = "") -> str:
    """The run's name; one that is no template is itself.

    Args:
        moment: Of the start; now by default, for a run that no flow run started.
        id: Of the flow run; drawn by default.

    Raises:
        ConfigError: a field that there is not, or what comes of it cannot name a run.
    """
    if not is_template(name):
        return check_run_name(name)
    at = (moment or datetime.now(UTC)).astimezone(UTC)
    values = {
        "date": f"{at:%Y-%m-%d}",
        "time": f"{at:%H%M%S}",
        "id": (id or secrets.token_hex(4))[:8],
    }
    try:
        parts = list(Formatter().parse(name))
    except ValueError as e:
        raise ConfigError(f"run_name={name!r} is no template ({e}): {_known()}") from e
    for _, field, form, conversion in parts:
        if field is not None and (field not in values or form or conversion):
            raise ConfigError(f"run_name={name!r} asks for {{{field}}}: {_known()}")
    return check_run_name(name.format(**values))


def _known() -> str:
    return "a name may hold " + ", ".join(f"{{{n}}} ({what})" for n, what in FIELDS.items())
