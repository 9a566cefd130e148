"""What a person sees on a terminal: one live view while it runs, one page at the end.

Piped, the live view becomes one line per finished phase of note, readable in a log.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rlhf_flows.reporting.headline import headline

__all__ = ["TerminalProgress"]

PHASES = ("rollout", "scoring", "training", "param_sync", "evaluation")
_SHOWN = (
    "reward", "exact", "accuracy", "margin", "loss", "kl", "entropy", "response_length",
    "logprob_gap",
)  # fmt: skip
"""Metrics of an episode worth a column, in this order."""
_ROWS = 8


class TerminalProgress:
    """Implements `tasks.Progress` on a rich console."""

    def __init__(self, console: Console, *, num_episode: int) -> None:
        self.console = console
        self.num_episode = num_episode
        self._title = "starting Prefect and Ray"
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._episodes: dict[int, Mapping[str, float]] = {}
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._live: Live | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                self._view(), console=self.console, refresh_per_second=4, transient=True
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
        self._episodes.clear()
        if not self.console.is_terminal:
            self.console.print(self._title)
        self._refresh()

    # ---- tasks.Progress -------------------------------------------------------------------

    def started(self, phase: str, number: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase.replace("_", " "), total=total, note="")
        self._bars.reset(self._tasks[phase], total=total, note=_note(phase, number))
        self._refresh()

    def advanced(self, phase: str, number: int, done: int) -> None:
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=done)
        self._refresh()

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        if phase in self._tasks:
            task = self._tasks[phase]
            self._bars.update(
                task, completed=self._bars.tasks[self._bars.task_ids.index(task)].total
            )
            self._bars.stop_task(task)
        if phase == "training":
            self._episodes[number] = metrics
            self._line(f"episode {number:>4}", seconds, metrics)
        elif phase == "evaluation":
            self._evaluations[number] = metrics
            self._line(f"evaluation of version {number}", seconds, metrics)
        self._refresh()

    def samples(self, episode: int, previews: Sequence[Mapping[str, Any]]) -> None:
        """Samples are shown in the UI and by `rlhf-flows show`."""

    # ---- inside ---------------------------------------------------------------------------

    def _line(self, what: str, seconds: float, metrics: Mapping[str, float]) -> None:
        if self.console.is_terminal:
            return
        shown = "  ".join(f"{m} {metrics[m]:.3f}" for m in headline(metrics, _SHOWN, most=8))
        self.console.print(
            f"{time.monotonic() - self._started:6.1f} s  {what}  {shown}", soft_wrap=True
        )

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._view())

    def _view(self) -> Group:
        elapsed = time.monotonic() - self._started
        title = Text(f"{self._title}  ·  {elapsed:.0f} s", style="bold")
        return Group(title, self._bars, self._table())

    def _table(self) -> Table:
        columns = headline([m for row in self._episodes.values() for m in row], _SHOWN, most=8)
        table = Table(box=None, pad_edge=False)
        table.add_column("episode", justify="right")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right")
        for number in sorted(self._episodes)[-_ROWS:]:
            row = self._episodes[number]
            table.add_row(
                f"{number + 1} of {self.num_episode}",
                *(f"{row[m]:.3f}" if m in row else "" for m in columns),
            )
        for version, metrics in list(self._evaluations.items())[-3:]:
            shown = "  ".join(f"{m} {metrics[m]:.3f}" for m in headline(metrics, _SHOWN))
            table.caption = f"held out, version {version}: {shown}"
        return table


def _note(phase: str, number: int) -> str:
    return f"version {number}" if phase in ("param_sync", "evaluation") else f"episode {number + 1}"
