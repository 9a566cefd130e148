"""`RunBoard`: what a run looks like right now, as plain numbers; not where it is shown.

It listens to the phases (`Progress`) and answers with a percentage, what is under way, a table of
episodes, curves and some samples. The decision here: a row of an episode comes from its training
metrics, which `trained.json` holds too, so the table of a resumed run starts with what earlier
attempts did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.reporting.headline import headline
from rlhf_flows.reporting.now import Now, Work
from rlhf_flows.reporting.pace import Pace
from rlhf_flows.reporting.panels import Curve, Line, curves_of_training, curves_of_work, points
from rlhf_flows.reporting.sample_tables import one_a_prompt, short, side_by_side, text

__all__ = ["RunBoard"]

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
_MENTIONED = ("reward", "accuracy", "loss", "kl", "response_length")
"""Metrics of the newest episode that stand beside what is done right now."""


class RunBoard:
    """Told by the phases; asked by those who show it."""

    def __init__(
        self,
        *,
        settings: RuntimeConfig,
        phases: Mapping[str, Iterable[int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            phases: Of each phase of the run, its episodes or policy versions from first to last.
            clock: Seconds since the epoch.
        """
        self._clock = clock
        self._pace = Pace()
        self._work: dict[tuple[str, int], Work] = {}
        """Under way, in the order in which they began."""
        self._settings = settings
        self._share = {(p, n): 0.0 for p, numbers in phases.items() for n in numbers}
        self._episodes: dict[int, dict[str, float]] = {}
        self._seconds: dict[int, dict[str, float]] = {}
        self._tokens: dict[int, dict[str, float]] = {}
        """By episode and phase."""
        self._evaluations: dict[int, dict[str, float]] = {}
        self._held_out: dict[int, list[dict[str, Any]]] = {}
        """Samples of evaluations, by version."""
        self._samples: dict[int, list[dict[str, Any]]] = {}
        self.changes = 0
        """Counts up with whatever is told."""
        self.stopped_by = ""
        """What ended the run before its end."""

    def resume(self, commits: Mapping[int, Mapping[str, Any]], *, first: int) -> None:
        """Takes over what earlier attempts did: payloads of `trained.json`, by episode."""
        for phase, number in self._share:
            before = first if phase in PHASES[:3] else first + 1
            if number < before and phase != "evaluation":
                self._share[phase, number] = 1.0
        for episode, commit in commits.items():
            self._episodes.setdefault(episode, {}).update(commit["metrics"])
            self._spend("training", episode, commit["seconds"], commit["metrics"])
        if self._pace.has_begun:  # what is read from the store was not done since
            self._pace = Pace()
            self._pace.mark(self.percent / 100, at_s=self._clock())
        self.changes += 1

    # ---- told by the phases ---------------------------------------------------------------

    def begin(self, run: str, num_episode: int) -> None: ...
    def incident(self, kind: str, what: str, facts: Mapping[str, Any]) -> None: ...

    def started(self, phase: str, number: int, total: int) -> None:
        now = self._clock()
        self._work[phase, number] = Work(phase=phase, number=number, done=0, total=total, since=now)
        if not self._pace.has_begun and phase in PHASES[:3]:
            self._pace.mark(self.percent / 100, at_s=now)
        self.changes += 1

    def advanced(self, phase: str, number: int, done: int) -> None:
        if (work := self._work.get((phase, number))) is None:
            return
        self._work[phase, number] = replace(work, done=done)
        if work.total and (phase, number) in self._share:
            self._share[phase, number] = min(1.0, done / work.total)
        self.changes += 1

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        if (phase, number) in self._share:
            self._share[phase, number] = 1.0
        self._work.pop((phase, number), None)
        if phase == "evaluation":
            self._evaluations[number] = dict(metrics)
        # The sync to version v and its evaluation belong to the episode that made it.
        episode = number if phase in PHASES[:3] else number - 1
        if episode >= 0:
            self._spend(phase, episode, seconds, metrics)
            if phase in ("scoring", "training"):
                self._episodes.setdefault(episode, {}).update(metrics)
        if phase == "training":
            self._pace.mark(self.percent / 100, at_s=self._clock())
        self.changes += 1

    def _spend(
        self, phase: str, episode: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        self._seconds.setdefault(episode, {})[phase] = seconds
        # Several modules are trained on the same samples: not their sum.
        tokens = [n for name, n in metrics.items() if name.rpartition("/")[2] == "tokens"]
        if tokens:
            self._tokens.setdefault(episode, {})[phase] = max(tokens)

    def samples(self, episode: int, previews: Sequence[Mapping[str, Any]]) -> None:
        if previews:
            self._samples[episode] = [
                dict(p) for p in one_a_prompt(previews, most=_SAMPLES_PER_EPISODE)
            ]
        self.changes += 1

    def held_out(self, version: int, previews: Sequence[Mapping[str, Any]]) -> None:
        if previews:
            self._held_out[version] = [dict(p) for p in previews]
        self.changes += 1

    # ---- asked by who shows it ------------------------------------------------------------

    @property
    def percent(self) -> float:
        """Of all phases of all episodes."""
        return 100.0 * sum(self._share.values()) / max(1, len(self._share))

    def now(self) -> Now:
        """What is under way, and how long the run has to go."""
        settings, at = self._settings, self._clock()
        trained = self._share_of("training")
        sampled = self._share_of("rollout") or trained
        newest = self._episodes[max(self._episodes)] if self._episodes else {}
        whole_s, samples = self._pace.whole_s, settings.num_episode * settings.sample_per_episode
        return Now(
            percent=self.percent,
            trained=sum(1 for share in trained.values() if share == 1.0),
            num_episode=settings.num_episode,
            samples=round(sum(sampled.values()) * settings.sample_per_episode),
            sample_per_episode=settings.sample_per_episode,
            work=tuple(self._work.values()),
            left_s=self._pace.left_s(at_s=at),
            samples_per_s=samples / whole_s if whole_s else None,
            at=at,
            stopped_by=self.stopped_by,
            headline={
                name: newest[name]
                for name in headline(newest, _MENTIONED)
                if name.rpartition("/")[2] in _MENTIONED
            },
        )

    def _share_of(self, phase: str) -> dict[int, float]:
        return {number: share for (p, number), share in self._share.items() if p == phase}

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
                **{_METRICS.get(m, m): short(self._episodes[episode].get(m)) for m in metrics},
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
                "prompt": text(sample.get("prompt")),
                "completion": text(sample.get("completion")),
                "reward": short(sample.get("reward")),
                "finish": sample.get("finish_reason"),
                "sample": sample.get("sample_id"),
            }
            for episode in shown
            for sample in self._samples[episode]
        ]

    def side_by_side(self) -> list[dict[str, str]]:
        """The same prompts under several versions; of training, where nothing is evaluated."""
        if len(self._held_out) > 1:
            return side_by_side(self._held_out, name="version")
        return side_by_side(self._samples, name="episode")

    def curves(self) -> list[Curve]:
        """The reward, and the first other thing that is measured of samples, else the loss; what
        training measured; where tokens and seconds went.
        """
        extra = [n for n in self._columns() if n not in _METRICS and self._is_evaluated(n)]
        names = [n for n in ("reward", *extra[:1]) if self._has(n)] or ["loss"]
        return [
            *(curve for curve in map(self._by_version, names) if curve.lines),
            *curves_of_training(self._episodes, without=names),
            *curves_of_work(self._seconds, self._tokens, phases=PHASES),
        ]

    def _by_version(self, name: str) -> Curve:
        """Of the samples that were trained on, and of held-out prompts."""
        found = {
            "trained on": points(self._episodes, name, lag=self._settings.max_staleness),
            "held out": points(self._evaluations, name),
        }
        lines = tuple(Line(name=of, points=some) for of, some in found.items() if some)
        return Curve(name=name, lines=lines, across="policy version")

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
