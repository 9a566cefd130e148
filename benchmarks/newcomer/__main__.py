"""A newcomer's first day: every command of docs/first_day.md, in a fresh clone, with its time.

    python -m benchmarks.newcomer [--keep FOLDER] [--json FILE]

The page is the program: its console blocks are run as they stand, in one shell, and the first one
that fails ends it. The clone has the last commit; pip's cache is what this machine has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import describe_machine, one_line

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/first_day.md")
_MARK = "newcomer-step"
_LIMIT_S = 1800
_LAST_LINES = 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.newcomer")
    parser.add_argument("--keep", type=Path, help="clone to this folder, and leave it there")
    parser.add_argument("--json", type=Path, help="write the seconds of each command here")
    args = parser.parse_args()
    machine = describe_machine()
    print(one_line(machine), flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clone = args.keep or Path(folder) / "rlhf_flows"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        steps = list(commands((clone / PAGE).read_text("utf-8")))
        seconds, status = _run(steps, clone)
    found = [{"command": c, "seconds": s} for c, s in zip(steps, seconds, strict=False)]
    for step in found:
        print(f"{step['seconds']:7.1f} s  {str(step['command']).splitlines()[0]}")
    print(f"{sum(seconds):7.1f} s  in all, {len(seconds)} of {len(steps)} commands")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "steps": found}, indent=1))
    sys.exit(status)


def commands(page: str) -> Iterator[str]:
    """The commands of the console blocks: each begins with `$`, what follows belongs to it."""
    for block in re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        yield from (c.strip() for c in re.split(r"^\$ ", block, flags=re.MULTILINE) if c.strip())


def _run(steps: Sequence[str], folder: Path) -> tuple[list[float], int]:
    """Seconds of each command that was begun, and the status of the last one."""
    home = folder.parent / f"{folder.name}-home"
    home.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))}
    environment |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    script = "\n".join(("set -e", *(f"echo {_MARK}\n{step}" for step in steps)))
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    starts: list[float] = []
    said: list[str] = []
    assert shell.stdout is not None
    limit = threading.Timer(_LIMIT_S, _stop, [shell])
    limit.start()
    try:
        for line in shell.stdout:
            if line.startswith(_MARK):
                starts.append(time.monotonic())
                said = [f"$ {steps[len(starts) - 1]}\n"]
                print(said[0].splitlines()[0], flush=True)
            else:
                said.append(line)
        status = shell.wait(_LIMIT_S)
    finally:
        limit.cancel()
        _stop(shell)
    ends = [*starts[1:], time.monotonic()]
    if status:
        print("".join([said[0], *said[1:][-_LAST_LINES:]]), file=sys.stderr)
    return [end - start for start, end in zip(starts, ends, strict=True)], status


def _stop(shell: subprocess.Popen[str]) -> None:
    """What the page leaves running, the server and the worker, is of the shell's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
