"""One thing of a Prefect server that a command is about to make, change or leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Change", "Outcome"]

Outcome = Literal["created", "updated", "unchanged", "removed"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What it is, what becomes of it, and how."""

    kind: str
    name: str
    outcome: Outcome
    detail: str = ""
    do: Callable[[], object] | None = field(default=None, repr=False, compare=False)
    """None where nothing is to be done, or another change of the same kind does it along."""
