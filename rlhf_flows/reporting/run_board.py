"""`RunBoard`: what a run looks like right now, as plain numbers; not where it is shown.

It listens to the phases (`Progress`) and answers with a percentage, a table of episodes, two curves
and some samples. The decision here: a row of an episode comes from its training metrics, which
`trained.json` holds too, so the table of a resumed run starts with what earlier attempts did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_flows.config import RuntimeConfig

__all__ = ["Curve", "RunBoard"]

PHASES = ("rollout", "scoring", "training", "param_sync", "evaluation")

_METRICS = {
    "reward": "reward",
    "response_length": "length",
    "truncated": "truncated",
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "clip_fraction": "clip fraction",
    "grad_norm": "grad norm",
    "logprob_gap": "logprob gap",
}
"""Metrics that have a column of their own, in order, and its heading."""
_NO_COLUMN = frozenset(
    {
        "advantage", "gap_tokens", "importance_weight", "learning_rate", "logprob_gap_max",
        "policy_loss", "ratio", "rows", "rows_filtered", "rows_trained", "seconds", "tokens",
    }
)  # fmt: skip
_MAX_EXTRA = 5
"""Columns for what else is measured of the samples, such as the parts of a reward."""
_MAX_ROWS = 500
_SAMPLES_PER_EPISODE = 3
_EPISODES_WITH_SAMPLES = 8
_MAX_TEXT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric: of the samples that were trained on, and of held-out prompts."""

    name: str
    train: tuple[tuple[int, float], ...]
    """(policy version that sampled, mean)."""
    held_out: tuple[tuple[int, float], ...]
    """(policy version, mean)."""


class RunBoard:
    """Told by the phases; asked by those who show it."""

    def __init__(
        self,
        *,
        settings: RuntimeConfig,
        phases: Mapping[str, Iterable[int]],
    ) -> None:
        """
        Args:
            phases: Of each phase of the run, its episodes or policy versions from first to last.
        """
        self._settings = settings
        self._share = {(p, n): 0.0 for p, numbers in phases.items() for n in numbers}
        self._totals: dict[tuple[str, int], int] = {}
        self._episodes: dict[int, dict[str, float]] = {}
        self._seconds: dict[int, dict[str, float]] = {}
        self._evaluations: dict[int, dict[str, float]] = {}
        self._samples: dict[int, list[dict[str, Any]]] = {}
        self.changes = 0
        """Counts up with whatever is told."""

    def resume(self, commits: Mapping[int, Mapping[str, Any]], *, first: int) -> None:
        """Takes over what earlier attempts did: payloads of `trained.json`, by episode."""
        for phase, number in self._share:
            before = first if phase in PHASES[:3] else first + 1
            if number < before and phase != "evaluation":
                self._share[phase, number] = 1.0
        for episode, commit in commits.items():
            self._episodes.setdefault(episode, {}).update(commit["metrics"])
            self._seconds.setdefault(episode, {})["training"] = commit["seconds"]
        self.changes += 1

    # ---- told by the phases ---------------------------------------------------------------

    def begin(self, run: str, num_episode: int) -> None: ...

    def started(self, phase: str, number: int, total: int) -> None:
        self._totals[phase, number] = total
        self.changes += 1

    def advanced(self, phase: str, number: int, done: int) -> None:
        total = self._totals.get((phase, number), 0)
        if total and (phase, number) in self._share:
            self._share[phase, number] = min(1.0, done / total)
        self.changes += 1

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        if (phase, number) in self._share:
            self._share[phase, number] = 1.0
        if phase == "evaluation":
            self._evaluations[number] = dict(metrics)
        # The sync to version v and its evaluation belong to the episode that made it.
        episode = number if phase in PHASES[:3] else number - 1
        if episode >= 0:
            self._seconds.setdefault(episode, {})[phase] = seconds
            if phase in ("scoring", "training"):
                self._episodes.setdefault(episode, {}).update(metrics)
        self.changes += 1

    def samples(self, episode: int, previews: Sequence[Mapping[str, Any]]) -> None:
        if previews:
            self._samples[episode] = [dict(p) for p in _one_a_prompt(previews)]
        self.changes += 1

    # ---- asked by who shows it ------------------------------------------------------------

    @property
    def percent(self) -> float:
        """Of all phases of all episodes."""
        return 100.0 * sum(self._share.values()) / max(1, len(self._share))

    def episodes(self) -> list[dict[str, float | int | None]]:
        """The table of episodes, the newest first; at most the last 500."""
        shown = sorted(self._episodes, reverse=True)[:_MAX_ROWS]
        metrics = [
            name for name in self._columns() if any(name in self._episodes[e] for e in shown)
        ]
        seconds = [p for p in PHASES if any(p in self._seconds.get(e, {}) for e in shown)]
        return [
            {
                "episode": episode,
                **{_METRICS.get(m, m): _short(self._episodes[episode].get(m)) for m in metrics},
                **{f"{p.replace('_', ' ')} s": self._seconds_of(episode, p) for p in seconds},
            }
            for episode in shown
        ]

    def sample_rows(self) -> list[dict[str, Any]]:
        """Some samples of the first episode seen and of the last ones, the newest first."""
        newest = sorted(self._samples, reverse=True)
        shown = [*newest[: _EPISODES_WITH_SAMPLES - 1], *newest[_EPISODES_WITH_SAMPLES - 1 :][-1:]]
        return [
            {
                "episode": episode,
                "prompt": _text(sample.get("prompt")),
                "completion": _text(sample.get("completion")),
                "reward": _short(sample.get("reward")),
                "finish": sample.get("finish_reason"),
                "sample": sample.get("sample_id"),
            }
            for episode in shown
            for sample in self._samples[episode]
        ]

    def curves(self) -> list[Curve]:
        """The reward, and the first other thing that is measured of samples; else the loss."""
        extra = [n for n in self._columns() if n not in _METRICS and self._is_evaluated(n)]
        names = [n for n in ("reward", *extra[:1]) if self._has(n)] or ["loss"]
        lag = self._settings.max_staleness
        curves = [
            Curve(
                name=name,
                train=tuple(
                    (max(0, e - lag), m[name])
                    for e, m in sorted(self._episodes.items())
                    if name in m
                ),
                held_out=tuple(
                    (v, m[name]) for v, m in sorted(self._evaluations.items()) if name in m
                ),
            )
            for name in names
        ]
        return [curve for curve in curves if curve.train or curve.held_out]

    def _columns(self) -> list[str]:
        """Names of metrics in the order of the table."""
        measured = dict.fromkeys(n for m in self._episodes.values() for n in m)
        extra = [
            n
            for n in measured
            if n not in _METRICS and n.rpartition("/")[2] not in _NO_COLUMN | _METRICS.keys()
        ]
        # Parts of a reward rather than numbers of the data: what evaluations measure, too, and
        # what is a share.
        extra.sort(key=lambda n: (not self._is_evaluated(n), not self._is_share(n)))
        first, *rest = _METRICS
        return [first, *extra[:_MAX_EXTRA], *rest]

    def _seconds_of(self, episode: int, phase: str) -> float | None:
        seconds = self._seconds.get(episode, {}).get(phase)
        return None if seconds is None else round(seconds, 2)

    def _has(self, name: str) -> bool:
        return self._is_evaluated(name) or any(name in m for m in self._episodes.values())

    def _is_share(self, name: str) -> bool:
        return all(0.0 <= m.get(name, 0.0) <= 1.0 for m in self._episodes.values())

    def _is_evaluated(self, name: str) -> bool:
        return any(name in m for m in self._evaluations.values())


def _one_a_prompt(previews: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Samples of different prompts first."""
    seen: set[Any] = set()
    first: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for preview in previews:
        (others if preview.get("prompt") in seen else first).append(preview)
        seen.add(preview.get("prompt"))
    return [*first, *others][:_SAMPLES_PER_EPISODE]


def _short(value: float | None) -> float | None:
    """A number short enough to read: four digits behind the point, or three that say something."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.3g}") if abs(value) < 0.01 else round(value, 4)


def _text(value: Any) -> str:
    text = str(value) if value is not None else ""
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
