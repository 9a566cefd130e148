"""What the committed metrics of the last episodes say: a rail is broken, or something looks wrong.

Pure functions of commits and settings: whoever looks, in whichever attempt, sees the same. An
episode's metrics are means over its samples, so they speak of the version that these were sampled
from. Who looks, and what comes of it, is in `guarding`.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlhf_flows.guard_settings import MetricRail, StopIf

__all__ = ["Alarm", "Broken", "Trained", "alarms", "bad_since", "broken", "episodes_looked_at"]

_BEFORE = 10
"""Episodes that an alarm compares with."""
_AT_LEAST = 5
"""Of them, before there is an alarm."""
_DEVIATIONS = 4.0
_SHARE_OF_MEAN = 0.2
_TIMES_MEDIAN = 10.0
_KL_AT_LEAST = 0.1
"""Nats per token: below it, many times as much is still little."""

_VITAL = frozenset({"reward", "advantage", "kl", "entropy", "grad_norm"})
"""Besides every loss: what the rail `nan` looks at. A part of a reward may have no value for some
samples, and harm nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """An episode as its commit has it."""

    episode: int
    metrics: Mapping[str, float]
    """Of its training; finite."""
    nonfinite: tuple[str, ...] = ()
    """Metrics that are NaN or infinite."""

    @classmethod
    def of(cls, commit: Mapping[str, Any]) -> Self:
        """From the payload of `trained.json`."""
        return cls(
            episode=commit["episode"],
            metrics=commit["metrics"],
            nonfinite=tuple(commit.get("nonfinite", ())),
        )

    def values(self, metric: str) -> dict[str, float]:
        """The metric under its name, or those of several modules; NaN where it is not finite."""
        every = {**self.metrics, **dict.fromkeys(self.nonfinite, math.nan)}
        if metric in every:
            return {metric: every[metric]}
        return {name: value for name, value in every.items() if _last(name) == metric}


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A rail that stops the run."""

    setting: str
    """Of `runtime.stop_if`."""
    first_bad: int
    """The episode in which it began."""
    what: str
    values: Mapping[str, float]
    """Of the last episode, by name; without those that are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that looks wrong, and stops nobody."""

    kind: str
    what: str
    facts: Mapping[str, Any]


def episodes_looked_at(stop_if: StopIf) -> int:
    """How many of the last commits decide."""
    return max([_BEFORE + 2, *(rail.for_episodes for _, rail in stop_if.rails())])


# ---- rails ------------------------------------------------------------------------------------


def broken(stop_if: StopIf, history: Sequence[Trained]) -> Broken | None:
    """The first rail that the newest episode of `history` breaks, if it breaks one.

    Args:
        history: The last committed episodes, in order, at least `episodes_looked_at` of them or
            all. An episode without the metric of a rail ends what counted up to it.
    """
    if not history:
        return None
    newest = history[-1]
    if stop_if.nan and (names := [name for name in newest.nonfinite if _is_vital(name)]):
        return Broken(
            setting="nan",
            first_bad=newest.episode,
            what=f"{' and '.join(names)} of episode {newest.episode} is NaN or infinite",
            values={},
        )
    for setting, rail in stop_if.rails():
        bad = _bad(rail, history)
        if len(bad) >= rail.for_episodes:
            values = newest.values(rail.metric)
            return Broken(
                setting=setting,
                first_bad=bad[0].episode,
                what=_told(rail, bad[-rail.for_episodes :]),
                values={name: value for name, value in values.items() if math.isfinite(value)},
            )
    return None


def bad_since(stop_if: StopIf, history: Sequence[Trained]) -> int | None:
    """The first of the bad episodes in a row that `history` ends with, by any rail."""
    bad = [_bad(rail, history) for _, rail in stop_if.rails()]
    return min((found[0].episode for found in bad if found), default=None)


def _bad(rail: MetricRail, history: Sequence[Trained]) -> list[Trained]:
    """The bad episodes in a row that `history` ends with."""
    found: list[Trained] = []
    for trained in reversed(history):
        if not any(_is_beyond(rail, value) for value in trained.values(rail.metric).values()):
            break
        found.insert(0, trained)
    return found


def _is_beyond(rail: MetricRail, value: float) -> bool:
    if math.isnan(value):
        return True
    is_above = rail.above is not None and value > rail.above
    return is_above or (rail.below is not None and value < rail.below)


def _told(rail: MetricRail, bad: Sequence[Trained]) -> str:
    bounds = [
        f"{side} {bound:g}"
        for side, bound in (("above", rail.above), ("below", rail.below))
        if bound is not None
    ]
    values = "; ".join(
        f"episode {trained.episode}: "
        + ", ".join(f"{n} {v:.4g}" for n, v in trained.values(rail.metric).items())
        for trained in bad
    )
    return f"{rail.metric} is {' or '.join(bounds)} ({values})"


def _is_vital(name: str) -> bool:
    return _last(name) in _VITAL or "loss" in _last(name)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


# ---- alarms -----------------------------------------------------------------------------------


def alarms(history: Sequence[Trained]) -> list[Alarm]:
    """What looks wrong in the newest episode of `history`, and did not in the one before."""
    if not history:
        return []
    known = {alarm.kind for alarm in _alarms(history[:-1])}
    found = [alarm for alarm in _alarms(history) if alarm.kind not in known]
    if history[-1].nonfinite:
        names = ", ".join(history[-1].nonfinite)
        what = f"not finite in episode {history[-1].episode}: {names}"
        found.append(Alarm(kind="nan", what=what, facts={"metrics": list(history[-1].nonfinite)}))
    return found


def _alarms(history: Sequence[Trained]) -> list[Alarm]:
    if not history:
        return []
    newest, before = history[-1], history[-1 - _BEFORE : -1]
    found = []
    for kind, metric, limit_of, is_wrong in _WATCHED:
        for name, value in newest.values(metric).items():
            known = [trained.metrics[name] for trained in before if name in trained.metrics]
            if len(known) < _AT_LEAST or math.isnan(value):
                continue
            limit = limit_of(known)
            if is_wrong(value, limit):
                what = (
                    f"{name} of episode {newest.episode} is {value:.4g}; by the {len(known)}"
                    f" episodes before, {limit:.4g} was to be expected"
                    f" {'at least' if metric == 'reward' else 'at most'}"
                )
                facts = {"metric": name, "value": value, "limit": limit}
                found.append(Alarm(kind=kind, what=what, facts=facts))
    return found


def _least_reward(known: Sequence[float]) -> float:
    """Four standard deviations below the mean, and a fifth of the mean at least."""
    mean = statistics.fmean(known)
    return mean - max(_DEVIATIONS * statistics.pstdev(known), _SHARE_OF_MEAN * abs(mean))


def _most_kl(known: Sequence[float]) -> float:
    return max(_TIMES_MEDIAN * statistics.median(known), _KL_AT_LEAST)


_WATCHED: tuple[
    tuple[str, str, Callable[[Sequence[float]], float], Callable[[float, float], bool]], ...
] = (
    ("reward-collapse", "reward", _least_reward, operator.lt),
    ("kl-blow-up", "kl", _most_kl, operator.gt),
)
"""Alarm, metric, the limit by the episodes before, and what is wrong of a value and its limit."""
