"""Runs one side of a comparison in a process tree of its own, and reads the clocks at its marks.

A side is a module that takes its work as options and marks the end of each of its steps; a step is
whatever the comparison counts by.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu_clock import CpuTree, Reading
from benchmarks.marks import read_mark
from rlhf_flows.services.environment import prepare_environment

__all__ = ["Measured", "bench_folder", "measure", "trl_python"]

_REPOSITORY = Path(__file__).resolve().parents[1]


def bench_folder() -> Path:
    """Where models and logs go."""
    return Path(os.environ.get("BENCH_DIR") or Path(tempfile.gettempdir(), "rlhf-flows-bench"))


def trl_python() -> str:
    """The interpreter of TRL's own environment; ends the program where there is none."""
    folder = Path(os.environ.get("BENCH_TRL_VENV") or Path(tempfile.gettempdir(), "trl-venv"))
    python = folder / "bin" / "python"
    if not python.exists():
        sys.exit(
            f"no virtual environment with TRL at {folder}: make it with"
            " `make -C benchmarks/grpo_vs_trl venv`, or name another with BENCH_TRL_VENV"
        )
    return str(python)


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one run of one side took, per step, after its warm-up."""

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


def measure(
    module: str,
    options: Sequence[str],
    *,
    warmup: int,
    steps: int,
    main_process: str,
    python: str,
    log: Path,
) -> Measured:
    """Runs the side to its end; what it does after its last step is not counted.

    Args:
        main_process: what to call the process that is started, among those that it starts.

    Raises:
        RuntimeError: it failed; its output is in `log`.
    """
    readings: list[Reading] = []
    marks: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    curves: dict[str, list[float]] = defaultdict(list)
    prepare_environment()  # as the command line does
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(_REPOSITORY), "PREFECT_HOME": str(log.with_name("prefect"))}
    command = [python, "-m", module, *options]
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
    if code != 0 or len(readings) != warmup + steps:
        raise RuntimeError(
            f"{module} ended with exit code {code} after {len(readings)} steps of"
            f" {warmup + steps}: see {log}"
        )
    names[tree.process.pid] = main_process
    found = _between(readings[warmup - 1 :], names)
    found.curves = dict(curves)
    found.startup_s = readings[warmup - 1].at_s - begun.at_s
    for mark in marks[warmup:]:
        for phase, seconds in mark["seconds"].items():
            found.phases[phase] = found.phases.get(phase, 0.0) + seconds / steps
    return found


def _between(readings: Sequence[Reading], names: dict[int, str]) -> Measured:
    """What the steps took that ended at each reading but the first."""
    found = Measured()
    for before, after in itertools.pairwise(readings):
        found.cpu_s.append(after.cpu_s - before.cpu_s)
        found.wall_s.append(after.at_s - before.at_s)
    first, last = readings[0], readings[-1]
    found.startup_cpu_s = first.cpu_s
    found.accounts = {
        "proc": last.proc_s - first.proc_s,
        "group": None if last.group_s is None or first.group_s is None
        else last.group_s - first.group_s,
    }  # fmt: skip
    found.processes = _by_process(first, last, names, len(readings) - 1)
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
