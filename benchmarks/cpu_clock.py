"""CPU-seconds of a command and of every process it ever starts, while it runs.

The decision here: what is compared is whole process trees. Ray, vLLM and Prefect start processes
that detach from their parents, so this process makes itself the reaper of orphans
(`PR_SET_CHILD_SUBREAPER`) and sums up `/proc/*/stat` of all its descendants, the dead ones by what
their parents waited for. Where a control group can be made (Linux, cgroup v2, enough rights), the
kernel's own account of the same processes is read beside it, and preferred.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CpuTree", "Reading"]

_PR_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """CPU-seconds since the command started."""

    at_s: float
    """`time.perf_counter` of the reading."""
    proc_s: float
    """By /proc."""
    group_s: float | None
    """By the control group; None where there is none."""
    by_process: Mapping[int, float] = field(default_factory=dict)
    """Of each living process, without what it waited for."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Of the living processes."""

    @property
    def cpu_s(self) -> float:
        return self.proc_s if self.group_s is None else self.group_s


class CpuTree:
    """Runs a command and reads its CPU time. One at a time in a process; ends what is left."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], errors: Path) -> None:
        """`errors` is the file that the command's standard error goes to."""
        self._command = list(command)
        self._env = dict(env)
        self._errors = errors
        self._group = _make_group()
        self._reaped_s = 0.0

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        # Ended from outside, this process still ends what it measures.
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        times = os.times()
        self._reaped_s = times.children_user + times.children_system
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                env=self._env,
                preexec_fn=self._enter_group,  # this process has no threads
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_all()
        signal.signal(signal.SIGTERM, self._before)
        if self._group is not None:
            with contextlib.suppress(OSError):
                self._group.rmdir()

    def _enter_group(self) -> None:
        if self._group is not None:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def lines(self) -> Iterator[str]:
        """What the command prints, until it ends; processes that it leaves behind do not count."""
        assert self.process.stdout is not None
        descriptor, pending = self.process.stdout.fileno(), b""
        while True:
            ready, _, _ = select.select([descriptor], [], [], 0.2)
            if ready:
                data = os.read(descriptor, 1 << 16)
                *whole, pending = (pending + data).split(b"\n")
                yield from (f"{line.decode(errors='replace')}\n" for line in whole)
                if not data:
                    return
            elif self.process.poll() is not None:
                return

    def read(self) -> Reading:
        processes = _descendants(os.getpid())
        times = os.times()
        reaped = times.children_user + times.children_system - self._reaped_s
        own = {pid: stat.own_s for pid, stat in processes.items()}
        waited_for = sum(stat.children_s for stat in processes.values())
        group_s = None
        if self._group is not None:
            for line in (self._group / "cpu.stat").read_text().splitlines():
                if line.startswith("usage_usec "):
                    group_s = int(line.split()[1]) / 1e6
        return Reading(
            at_s=time.perf_counter(),
            proc_s=sum(own.values()) + waited_for + reaped,
            group_s=group_s,
            by_process=own,
            names={pid: stat.name for pid, stat in processes.items()},
        )

    def _end_all(self) -> None:
        """Ends whatever the command left behind, and waits for it."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                left = _descendants(os.getpid())
                if not left:
                    return
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, kind)
                self.process.poll()
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class _Stat:
    name: str
    parent: int
    own_s: float
    children_s: float


def _descendants(root: int) -> dict[int, _Stat]:
    stats: dict[int, _Stat] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # A process that ends while it is read is in its parent's account already.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stats[int(entry.name)] = _stat(Path(entry.path, "stat").read_text())
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    found: dict[int, _Stat] = {}
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found[pid] = stats[pid]
            waiting.append(pid)
    return found


def _stat(text: str) -> _Stat:
    head, _, rest = text.rpartition(")")  # the name may hold anything
    fields = rest.split()
    user, system, children_user, children_system = map(int, fields[11:15])
    return _Stat(
        name=head.partition("(")[2],
        parent=int(fields[1]),
        own_s=(user + system) / _TICKS,
        children_s=(children_user + children_system) / _TICKS,
    )


def _make_group() -> Path | None:
    """A fresh control group (v2) under this process's own, where that is allowed."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    points = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    paths = [line.removeprefix("0::/") for line in own if line.startswith("0::/")]
    if not points or not paths:
        return None
    group = Path(points[0], paths[0], f"rlhf-flows-bench-{os.getpid()}-{time.monotonic_ns()}")
    try:
        group.mkdir()
        (group / "cpu.stat").read_text()
    except OSError:
        return None
    return group
