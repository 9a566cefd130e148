"""Which curves a run has: lines of numbers by episode or by policy version; not how they are drawn.

The decision here: a curve is there when its metric is. Nothing is named that a recipe does not
measure, so a run of `sft` has three panels and one of GRPO ten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Curve", "Line", "curves_of_training", "curves_of_work", "points"]

Points = tuple[tuple[int, float], ...]

_OF_TRAINING = {
    "kl": "KL to the reference",
    "entropy": "entropy",
    "response_length": "response length, tokens",
    "clip_fraction": "clip fraction",
    "logprob_gap": "logprob gap, sampler to trainer",
    "accuracy": "accuracy",
    "margin": "margin",
}
"""Metrics of a training with a panel of their own, and its title."""

_SHORT = {"param_sync": "sync"}
"""Phases whose name is too long for a legend of five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    points: Points
    """(episode or policy version, value), in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One panel of the picture."""

    name: str
    lines: tuple[Line, ...]
    across: str = "episode"
    """What the points are counted by."""
    is_stacked: bool = False
    """Lines stand on top of each other, as areas: parts of a whole."""
    is_log: bool = False
    """By powers of ten: lines far apart. Values that are not above zero are not drawn."""


def points(rows: Mapping[int, Mapping[str, float]], name: str, *, lag: int = 0) -> Points:
    """(number - lag, value) of each row that has a finite one, in order."""
    return tuple(
        (max(0, number - lag), row[name])
        for number, row in sorted(rows.items())
        if name in row and math.isfinite(row[name])
    )


def curves_of_training(
    episodes: Mapping[int, Mapping[str, float]], *, without: Iterable[str] = ()
) -> list[Curve]:
    """KL, entropy, lengths, clipping, gap: those that were measured, a line a trained module."""
    measured = dict.fromkeys(n for row in episodes.values() for n in row)
    shown = [name for name in _OF_TRAINING if name not in set(without)]
    curves = []
    for wanted in shown:
        names = [n for n in measured if n.rpartition("/")[2] == wanted]
        if wanted == "response_length":
            names = names[:1]  # trainers of the same samples measure the same of them
        lines = _lines((n.rpartition("/")[0] or wanted, points(episodes, n)) for n in names)
        if lines:
            curves.append(Curve(name=_OF_TRAINING[wanted], lines=lines))
    return curves


def curves_of_work(
    seconds: Mapping[int, Mapping[str, float]],
    tokens: Mapping[int, Mapping[str, float]],
    *,
    phases: Sequence[str],
) -> list[Curve]:
    """Tokens per second of each phase, and the seconds of all phases on top of each other.

    Args:
        seconds, tokens: By episode and phase.
    """
    rates = {
        episode: {p: n / seconds[episode][p] for p, n in row.items() if _took(seconds, episode, p)}
        for episode, row in tokens.items()
    }
    # Seconds of phases that an earlier attempt did are not known: the sum would look like a fall.
    most = max((len(row) for row in seconds.values()), default=0)
    known = {e: row for e, row in seconds.items() if len(row) > 1 or most == 1}
    spent = {e: {p: row.get(p, 0.0) for p in phases} for e, row in known.items()}
    used = [p for p in phases if any(row[p] for row in spent.values())]
    rated, summed = (
        _lines((_SHORT.get(p, p), points(rows, p)) for p in names)
        for rows, names in ((rates, phases), (spent, used))
    )
    return [
        curve
        for curve in (
            Curve(name="tokens/s", lines=rated, is_log=len(rated) > 1),
            Curve(name="seconds of an episode", lines=summed, is_stacked=True),
        )
        if curve.lines
    ]


def _took(seconds: Mapping[int, Mapping[str, float]], episode: int, phase: str) -> bool:
    return seconds.get(episode, {}).get(phase, 0.0) > 0


def _lines(named: Iterable[tuple[str, Points]]) -> tuple[Line, ...]:
    return tuple(Line(name=name, points=found) for name, found in named if found)
