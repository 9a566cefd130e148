"""What a person sees on a terminal: one live view while it runs, one page at the end.

Piped, the live view becomes one line per finished phase of note, readable in a log. The decision
here: whatever is shown fits the width of the terminal as it was at the start, down to 60 columns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rlhf_flows.reporting.headline import headline
from rlhf_flows.reporting.now import Work, waits_for
from rlhf_flows.reporting.pace import Pace, in_words

__all__ = ["TerminalProgress"]

PHASES = ("rollout", "scoring", "training", "param_sync", "evaluation")
_SHOWN = (
    "reward", "exact", "accuracy", "margin", "loss", "kl", "entropy", "response_length",
    "logprob_gap",
)  # fmt: skip
"""Metrics of an episode worth a column, in this order."""
_ROWS = 8
_BESIDE_BAR = 48
"""Columns that a line of a phase needs beside its bar."""
_COLUMN = 10
"""Columns that a metric needs at most, on average."""


class TerminalProgress:
    """Implements `tasks.Progress` on a rich console."""

    def __init__(self, console: Console, *, num_episode: int) -> None:
        self.console = console
        self.num_episode = num_episode
        self._title = "starting Prefect and Ray"
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=max(6, min(30, console.width - _BESIDE_BAR))),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._most = max(2, min(8, (console.width - 10) // _COLUMN))
        """Metrics that a line has room for."""
        self._tasks: dict[str, Any] = {}
        self._work: dict[str, Work] = {}
        """What the bar of each phase shows, under way or done."""
        self._pace = Pace()
        self._samples = 0.0
        """Of the newest episode."""
        self._episodes: dict[int, Mapping[str, float]] = {}
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._live: Live | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                self._view(), console=self.console, refresh_per_second=1, transient=True
            )
            self._live.__enter__()
        else:
            self.console.print(f"{self._title} ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)

    def begin(self, run: str, num_episode: int) -> None:
        """A run begins; the view starts over."""
        self._title, self.num_episode = f"run {run}", num_episode
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._work.clear()
        self._episodes.clear()
        self._evaluations.clear()
        self._pace, self._samples = Pace(), 0.0
        if not self.console.is_terminal:
            self.console.print(self._title)
        self._refresh()

    # ---- tasks.Progress -------------------------------------------------------------------

    def started(self, phase: str, number: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase.replace("_", " "), total=total, note="")
        now = time.monotonic()
        self._work[phase] = Work(phase=phase, number=number, done=0, total=total, since=now)
        if not self._pace.has_begun and phase in PHASES[:3]:
            self._pace.mark(number / max(1, self.num_episode), at_s=now)
        self._bars.reset(self._tasks[phase], total=total, note=_note(phase, number))
        self._refresh()

    def advanced(self, phase: str, number: int, done: int) -> None:
        work = self._work.get(phase)
        if work is not None and work.number == number:
            self._work[phase] = replace(work, done=done)
            self._bars.update(self._tasks[phase], completed=done)
            for other in self._work.values():  # who waits for it may not have to any more
                waits = waits_for(other, list(self._work.values()))
                note = f"waits for {waits}" if waits else _note(other.phase, other.number)
                self._bars.update(self._tasks[other.phase], note=note)
        self._refresh()

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        # A training may go over its rows several times.
        if phase in ("rollout", "scoring") or (phase == "training" and not self._samples):
            self._samples = _rows(metrics) or self._samples
        # While a training is on its way to the store, the bar may show the one that follows.
        if phase in self._tasks and self._work[phase].number == number:
            work = self._work[phase]
            self._work[phase] = replace(work, done=work.total)
            task = self._tasks[phase]
            self._bars.update(task, completed=work.total, note=_note(phase, number))
            self._bars.stop_task(task)
        if phase == "training":
            self._episodes[number] = metrics
            self._pace.mark((number + 1) / max(1, self.num_episode), at_s=time.monotonic())
            self._line(f"episode {number:>4}", seconds, metrics)
        elif phase == "evaluation":
            self._evaluations[number] = metrics
            self._line(f"evaluation of version {number}", seconds, metrics)
        self._refresh()

    def samples(self, episode: int, previews: Sequence[Mapping[str, Any]]) -> None:
        """Samples are shown in the UI and by `rlhf-flows show`."""

    def incident(self, kind: str, what: str, facts: Mapping[str, Any]) -> None:
        """Incidents are among the logs, and events of the server."""

    def held_out(self, version: int, previews: Sequence[Mapping[str, Any]]) -> None:
        """As samples are."""

    # ---- inside ---------------------------------------------------------------------------

    def _line(self, what: str, seconds: float, metrics: Mapping[str, float]) -> None:
        if self.console.is_terminal:
            return
        shown = "  ".join(f"{m} {metrics[m]:.3f}" for m in headline(metrics, _SHOWN, most=8))
        now = time.monotonic()
        left_s = self._pace.left_s(at_s=now)
        to_go = f"  about {in_words(left_s)} to go" if left_s else ""
        self.console.print(f"{now - self._started:6.1f} s  {what}  {shown}{to_go}", soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._view())

    def _view(self) -> Group:
        elapsed = time.monotonic() - self._started
        title = Text(f"{self._title}  ·  {in_words(elapsed)}", style="bold")
        return Group(title, Text(self._outlook(), style="dim"), self._bars, self._table())

    def _outlook(self) -> str:
        """How much is through, how fast, and how long the rest will take."""
        parts = [f"{max(self._episodes, default=-1) + 1} of {self.num_episode} episodes"]
        left_s, whole_s = self._pace.left_s(at_s=time.monotonic()), self._pace.whole_s
        if left_s is not None and whole_s:
            if self._samples:
                rate = self._samples * self.num_episode / whole_s
                parts.append(f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s")
            if len(self._episodes) < self.num_episode and left_s:
                parts.append(f"about {in_words(left_s)} to go")
        return "  ·  ".join(parts)

    def _table(self) -> Table:
        columns = headline(
            [m for row in self._episodes.values() for m in row], _SHOWN, most=self._most
        )
        table = Table(box=None, pad_edge=False)
        table.add_column("episode", justify="right")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right", overflow="ellipsis")
        for number in sorted(self._episodes)[-_ROWS:]:
            row = self._episodes[number]
            table.add_row(
                f"{number + 1} of {self.num_episode}",
                *(f"{row[m]:.3f}" if m in row else "" for m in columns),
            )
        for version, metrics in list(self._evaluations.items())[-3:]:
            shown = "  ".join(
                f"{m} {metrics[m]:.3f}" for m in headline(metrics, _SHOWN, most=self._most)
            )
            table.caption = f"held out, version {version}: {shown}"
        return table


def _note(phase: str, number: int) -> str:
    return f"version {number}" if phase in ("param_sync", "evaluation") else f"episode {number + 1}"


def _rows(metrics: Mapping[str, float]) -> float:
    """Samples of an episode: of one module, where several are trained on the same ones."""
    return max((n for name, n in metrics.items() if name.rpartition("/")[2] == "rows"), default=0.0)
