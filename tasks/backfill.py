"""`Backfill`: versions of another run that are to be evaluated, into that run.

The decision here: whoever evaluates is a run of its own, with its own name, attempts and actors.
Only the evaluations go to the other run, whose keys are put if absent. So a living attempt of that
run is neither fenced nor waited for, and whichever of the two is faster is adopted by the other.
Nothing of the other run is ever deleted from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Backfill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """What is evaluated of which run."""

    run: str
    """The run whose versions these are, and that gets the evaluations."""
    versions: tuple[int, ...]
    """In ascending order; 0 is what the run began with."""
    left_out: tuple[int, ...] = ()
    """Versions that were asked for, but whose weights are deleted."""
    module: str
    """The trained module whose weights a version has."""
    follower: str = "policy"
    """The module here that is brought to them."""
    settings: Mapping[str, Any] | None = None
    """What differs from the evaluations that the run does itself, beside prompts, calls, number of
    samples and seed; None where nothing does, so that both are the same evaluations."""
