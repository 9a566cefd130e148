"""Runs one side in a process tree of its own, and reads the clocks at each of its marks."""

from __future__ import annotations

import itertools
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.cpu_clock import CpuTree, Reading
from benchmarks.grpo_vs_trl.work import Work
from benchmarks.marks import read_mark
from rlhf_flows.services.environment import prepare_environment

__all__ = ["Measured", "SideName", "measure"]

SideName = Literal["ours", "trl_side"]
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one run of one side took, per step, after its warm-up."""

    side: str
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    """Mean wall seconds."""
    processes: dict[str, float] = field(default_factory=dict)
    """Mean CPU-seconds of each process that lives on; the rest is in "others"."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """What each step measured, from the first on: reward, kl, grad_norm."""
    accounts: dict[str, float | None] = field(default_factory=dict)
    """CPU-seconds of the measured steps by /proc and by the control group."""
    startup_s: float = 0.0
    startup_cpu_s: float = 0.0
    """From the start of the command to the end of the warm-up."""

    @property
    def mean_cpu_s(self) -> float:
        return statistics.fmean(self.cpu_s)

    @property
    def mean_wall_s(self) -> float:
        return statistics.fmean(self.wall_s)


def measure(side: SideName, work: Work, *, python: str, log: Path) -> Measured:
    """Runs the side to its end.

    Raises:
        RuntimeError: it failed; its output is in `log`.
    """
    command = [python, "-m", f"benchmarks.grpo_vs_trl.{side}", *work.options()]
    readings: list[Reading] = []
    marks: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    curves: dict[str, list[float]] = defaultdict(list)
    prepare_environment()  # as the command line does
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(_REPOSITORY), "PREFECT_HOME": str(log.with_name("prefect"))}
    with CpuTree(command, env=environment, errors=log) as tree, log.open("a") as lines:
        begun = tree.read()
        for line in tree.lines():
            mark = read_mark(line)
            if mark is None:
                lines.write(line)
                continue
            if mark["kind"] == "step":
                readings.append(tree.read())
                marks.append(mark)
            names |= {int(pid): name for pid, name in mark.get("names", {}).items()}
            for name, value in mark.get("metrics", {}).items():
                curves[name].append(value)
        code = tree.process.wait()
    if code != 0 or len(readings) != work.warmup + work.steps:
        raise RuntimeError(
            f"{side} ended with exit code {code} after {len(readings)} steps of"
            f" {work.warmup + work.steps}: see {log}"
        )
    names[tree.process.pid] = "the flow" if side == "ours" else "the trainer"
    found = Measured(side=side, curves=dict(curves))
    measured = readings[work.warmup - 1 :]
    for before, after in itertools.pairwise(measured):
        found.cpu_s.append(after.cpu_s - before.cpu_s)
        found.wall_s.append(after.at_s - before.at_s)
    first, last = measured[0], measured[-1]
    found.startup_s, found.startup_cpu_s = first.at_s - begun.at_s, first.cpu_s
    found.accounts = {
        "proc": last.proc_s - first.proc_s,
        "group": None if last.group_s is None or first.group_s is None
        else last.group_s - first.group_s,
    }  # fmt: skip
    for mark in marks[work.warmup :]:
        for phase, seconds in mark["seconds"].items():
            found.phases[phase] = found.phases.get(phase, 0.0) + seconds / work.steps
    found.processes = _by_process(first, last, names, work.steps)
    return found


def _by_process(
    first: Reading, last: Reading, names: dict[int, str], steps: int
) -> dict[str, float]:
    shares: dict[str, float] = defaultdict(float)
    for pid, seconds in last.by_process.items():
        name = names.get(pid) or last.names.get(pid, "others")
        shares[name] += (seconds - first.by_process.get(pid, 0.0)) / steps
    total = (last.cpu_s - first.cpu_s) / steps
    shares["others"] = shares.get("others", 0.0) + total - sum(shares.values())
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
