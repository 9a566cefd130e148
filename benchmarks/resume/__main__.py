"""What resuming costs: from `kill -9` of the flow to its first new shard, and what it waits for.

    python -m benchmarks.resume [--quick] [--json FILE] [--store URL]

A run with N committed shards is killed in rollout and started again, once with the pools alive (a
Ray head of its own) and once cold. Beside it: the listing of runs of many shards (`scan`), and the
cost of committing one shard.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, one_line
from benchmarks.marks import read_mark
from rlhf_flows.services.environment import prepare_environment

SHARDS = (1, 100, 10_000)
SCANNED = (100, 10_000, 200_000)
ROWS_PER_SHARD = 5
"""So that the last is a run of a million samples."""
_PATIENCE_S = 900.0
"""For one attempt; the first makes ten thousand shards."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume")
    parser.add_argument("--quick", action="store_true", help="leave out the largest runs")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    parser.add_argument("--store", help="only the cost of a commit, in this store (s3://…)")
    args = parser.parse_args()
    prepare_environment()
    machine = describe_machine()
    print(one_line(machine), flush=True)
    sizes = (20_000, 200_000, 2_000_000)
    commits = {str(size): _commit_ms(size, args.store) for size in sizes}
    print("\n| one shard of | committed in (median of 50) |\n|---|---|")
    for size, milliseconds in commits.items():
        print(f"| {int(size) // 1000} kB | {milliseconds:.1f} ms |")
    if args.store:
        return
    scans = {str(n): _scan_s(n) for n in SCANNED[: 2 if args.quick else 3]}
    print("\n| shards of a run | samples | scan |\n|---|---|---|")
    for shards, seconds in scans.items():
        print(f"| {shards} | {int(shards) * ROWS_PER_SHARD} | {seconds:.2f} s |")
    resumed = []
    print("\n| committed shards | pools | attempt begins | pools ready | first new shard |")
    print("|---|---|---|---|---|", flush=True)
    for number in SHARDS[: 2 if args.quick else 3]:
        for alive in (True, False):
            found = _resume(number, alive=alive)
            resumed.append({"shards": number, "alive": alive, **found})
            print(
                f"| {number} | {'alive' if alive else 'cold'} | {found['began']:.1f} s |"
                f" {found['ready']:.1f} s | {found['shard']:.1f} s |",
                flush=True,
            )
    if args.json:
        measured = {"machine": machine, "commit_ms": commits, "scan_s": scans, "resume_s": resumed}
        args.json.write_text(json.dumps(measured, indent=1))


# ---- the store alone --------------------------------------------------------------------------


def _commit_ms(size: int, url: str | None) -> float:
    """In a folder that goes with it, or below `url`, where the objects stay."""
    from rlhf_flows.store import RunLayout, commit_bytes, open_store

    data, layout = os.urandom(size), RunLayout(f"commits-{size}-{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder:
        store = open_store(url or folder)
        taken = []
        for index in range(50):
            started = time.perf_counter()
            commit_bytes(store, layout.shard("rollout", 0, index), data)
            taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def _scan_s(shards: int) -> float:
    from rlhf_flows.store import RunLayout, open_store, scan

    layout = RunLayout("run")
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder:
        for index in range(shards):
            path = Path(folder, layout.shard("rollout", index // 1000, index % 1000))
            if index % 1000 == 0:
                path.parent.mkdir(parents=True)
            path.touch()
        store = open_store(folder)
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            state = scan(store, "run")
            taken.append(time.perf_counter() - started)
        assert sum(len(e.rollout) for e in state.episodes.values()) == shards
    return min(taken)


# ---- a run, killed and started again ----------------------------------------------------------


def _resume(shards: int, *, alive: bool) -> dict[str, float]:
    """Seconds from the kill to the events of the second attempt."""
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder, _server() as url:
        environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_LOGGING_LEVEL": "ERROR"}
        with _head() if alive else contextlib.nullcontext() as head:
            if head is not None:
                environment |= head
            first = _start(folder, shards, environment)
            _marks_of(first, folder, ends_with=-signal.SIGKILL)
            killed = time.time()
            second = _start(folder, shards, environment)
            marks = _marks_of(second, folder, ends_with=0)
    return {kind: at - killed for kind, at in marks.items()}


def _start(folder: str, shards: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.resume.run", folder, str(shards)]
    with open(Path(folder, "errors"), "ab") as errors:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def _marks_of(process: subprocess.Popen[str], folder: str, *, ends_with: int) -> dict[str, float]:
    """When the process first said what, until its end."""
    assert process.stdout is not None
    watchdog = threading.Timer(_PATIENCE_S, process.kill)
    watchdog.start()
    marks: dict[str, float] = {}
    for line in process.stdout:
        found = read_mark(line)
        if found is not None:
            marks.setdefault(found["kind"], found["at"])
    code = process.wait(timeout=60)
    watchdog.cancel()
    if code != ends_with or not marks:
        sys.exit(f"an attempt ended with {code}:\n{Path(folder, 'errors').read_text()[-3000:]}")
    return marks


@contextlib.contextmanager
def _server() -> Iterator[str]:
    from prefect.settings import PREFECT_API_URL

    from rlhf_flows.services.prefect_server import prefect_api

    with prefect_api() as server:
        if server is not None:
            server.wait()
        url = PREFECT_API_URL.value()
        assert url is not None
        yield url


@contextlib.contextmanager
def _head() -> Iterator[dict[str, str]]:
    """A Ray head in a process of its own; how to reach it."""
    command = [sys.executable, "-m", "benchmarks.resume.head"]
    head = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        for line in head.stdout:
            found: dict[str, Any] | None = read_mark(line)
            if found is not None:
                yield dict(found["environment"])
                return
        sys.exit("the Ray head did not start")
    finally:
        head.stdin.close()
        head.wait(timeout=60)


if __name__ == "__main__":
    main()
