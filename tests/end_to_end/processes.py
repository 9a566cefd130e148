"""Flow processes that tests start, let die and start again, and what these leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


def start_victim(
    store: Path | str,
    run: str,
    log: Path,
    *,
    die: str,
    address: str | None,
    first: Iterable[tuple[Path | str, str]] = (),
    own_server: bool = False,
    signal_name: str = "SIGKILL",
    environment: Mapping[str, str] | None = None,
    models: Mapping[str, Any] | None = None,
    slow_s: float = 0.0,
    ends: Iterable[str] = (),
    reference_ema: float | None = None,
    **runtime: Any,
) -> subprocess.Popen[bytes]:
    """Starts a run that dies at the point `die`; what it prints is in `log` with suffix .log.

    Its policy takes `slow_s` longer for each shard; samples in `ends` end its worker. It starts a
    Ray head of its own where no `address` is given, and a server if asked to. Runs named in
    `first`, as store and name, come before, in the same process, to their end.
    """
    settings = {
        "signal": signal_name,
        "store": str(store),
        "run": run,
        "first": [(str(store), run) for store, run in first],
        "log": str(log),
        "die": die,
        "ends": list(ends),
        "address": address,
        "models": dict(models or {}),
        "slow_s": slow_s,
        "reference_ema": reference_ema,
        "runtime": runtime,
    }
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    if own_server:
        env.pop("PREFECT_API_URL", None)
    with log.with_suffix(".log").open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.victim", json.dumps(settings)],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        )


def run_victim(*where: Any, **how: Any) -> int:
    """Runs until it has killed itself; the exit status."""
    victim = start_victim(*where, **how)
    try:
        return victim.wait(timeout=200)
    finally:
        victim.kill()
        victim.wait()


def pids(log: Path) -> set[int]:
    return {int(line.split()[0]) for line in log.read_text().splitlines()}


def generated(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines()]


def watched(victim: subprocess.Popen[bytes], *, timeout_s: float) -> list[psutil.Process]:
    """Waits until the process has ended; every process that descended from it."""
    offspring: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + timeout_s
    while victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(victim.pid).children(recursive=True):
                offspring[child.pid] = child
    victim.kill()
    victim.wait()
    return list(offspring.values())


def assert_ended(processes: list[psutil.Process], *, timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    names = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()).strip()[:200])
            process.kill()
    # Two helpers of Ray's raylet try to report its death to the dead head for a minute first.
    assert set(names) <= {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}
