"""`CommandReward`: a program scores completions, such as a compiler or a runner of tests.

One process for each sample: the row as JSON on its standard input, the reward on the last line of
its standard output. The decision here: what a model wrote may be run by it, so nothing is trusted
to end. A small supervising process (command_supervisor.py) holds the limits and ends all that the
program started, whatever became of the program, or of the worker that asked. This bounds accidents;
it is no wall against an attacker: put `docker run`, `bwrap` or `nsjail` into the command for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.command_supervisor import remove_folder
from rlhf_flows.models.reward_results import Scoring, json_rows, short
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import OnFailure

__all__ = ["CommandReward"]

_MARK = "RLHF_FLOWS_COMMAND"
_SUPERVISOR = Path(__file__).with_name("command_supervisor.py")
_ENDING_S = 15.0
"""For the supervisor to end what the program started, beyond the time of the program."""
_MEBIBYTE = 1 << 20


class CommandReward(BaseModule):
    """Adds `reward` [B] float32, and a column for every other number the program returns."""

    def __init__(
        self,
        name: str = "reward",
        *,
        command: Sequence[str],
        timeout_s: float = 60.0,
        memory_mb: int = 1024,
        max_concurrency: int | None = None,
        environment: Sequence[str] = (),
        output_bytes: int = _MEBIBYTE,
        max_processes: int = 256,
        on_failure: OnFailure = "stop",
        failure_reward: float = 0.0,
    ) -> None:
        """
        Args:
            command: a program and its arguments; no shell reads them. The program runs in an empty
                folder of its own, so arguments that name files or folders here are made absolute.
                They must be there on every node. The last line that it writes is a number, or a
                JSON object of numbers with `reward`.
            timeout_s: longest that it may take, by the clock.
            memory_mb: most memory in MiB of it with all it starts, and the largest file it writes.
            max_concurrency: most of them at a time; one for each thread of the worker by default.
            environment: names of variables that it is given from the worker's environment. Others
                than PATH, HOME and TMPDIR (its folder) and LANG it does not see.
            output_bytes: most it may write to standard output.
            max_processes: most processes of one sample.
            on_failure: "stop": a sample for which the program fails (status, limits, no number)
                ends the run. "score": it gets `failure_reward`, and its cause stands in the column
                `reward_failure`. A program that cannot be started ends the run either way.
        """
        super().__init__(name)
        self.command = tuple(_absolute(i, str(part)) for i, part in enumerate(command))
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.max_concurrency = max_concurrency
        self.environment = tuple(environment)
        self.output_bytes = output_bytes
        self.max_processes = max_processes
        self.on_failure: OnFailure = on_failure
        self.failure_reward = failure_reward

    def validate(self) -> None:
        """Finds the program, and the supervisor's system; starts nothing. Raises ConfigError."""
        if not sys.platform.startswith("linux"):
            raise ConfigError(
                f"module {self.name!r} runs commands, which needs Linux (prctl, /proc); found"
                f" {sys.platform}: use a function or a service"
            )
        numbers = {
            name: getattr(self, name)
            for name in ("timeout_s", "memory_mb", "output_bytes", "max_processes")
        }
        numbers["max_concurrency"] = 1 if self.max_concurrency is None else self.max_concurrency
        for name, value in numbers.items():
            if not value > 0:
                raise ConfigError(
                    f"{name} of module {self.name!r} is {value}, expected more than 0"
                )
        Scoring.check(self.name, on_failure=self.on_failure, failure_reward=self.failure_reward)
        if not self.command or not self.command[0]:
            raise ConfigError(f"module {self.name!r} has no command: name a program")
        program = self.command[0]
        if shutil.which(program) is None:
            found = "it is there, but may not be executed: chmod +x it"
            raise ConfigError(
                f"the program {program!r} of module {self.name!r} cannot be started:"
                f" {found if Path(program).is_file() else 'there is none of that name on PATH'}"
            )

    def fingerprint(self) -> bytes:
        """With the files that the command names: a program that is mended is another one."""
        digest = hashlib.sha256()
        for part in self.command:
            if os.path.isabs(part) and Path(part).is_file():
                digest.update(Path(part).read_bytes())
        return super().fingerprint() + digest.digest()

    def setup(self) -> None:
        """Nothing to load."""

    @property
    def label(self) -> str:
        return f"reward command {shlex.join(self.command)!r:.300} of module {self.name!r}"

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Only the new columns, row by row.

        Raises RewardError: the program fails for a sample, or cannot be started.
        """
        scoring = Scoring(
            data, label=self.label, on_failure=self.on_failure, failure_reward=self.failure_reward
        )
        rows = json_rows(scoring.columns, range(scoring.num_samples))
        given_up = threading.Event()
        width = self.max_concurrency or max(1, self.context.num_threads)
        with ThreadPoolExecutor(width, thread_name_prefix="command") as threads:
            asked = [
                threads.submit(self._score, i, row, scoring, given_up) for i, row in enumerate(rows)
            ]
            try:
                wait(asked, return_when=FIRST_EXCEPTION)
                failed = next((a for a in asked if a.done() and a.exception()), None)
                returned = [failed.result()] if failed else [a.result() for a in asked]
            finally:  # those that run are ended, the others never begin
                given_up.set()
                threads.shutdown(wait=False, cancel_futures=True)
        return scoring.columns_of(returned)

    def _score(
        self, i: int, row: Mapping[str, Any], scoring: Scoring, given_up: threading.Event
    ) -> Any:
        """What the program returned for one row, or Failed."""
        report = self._supervised(row, given_up)
        if report is None:
            return scoring.fail(i, "was lost: its supervising process was killed")
        if "refused" in report:
            raise scoring.wrong(
                i,
                f"cannot be started on {socket.gethostname()} ({report['refused']}): it must be"
                " there on every node",
            )
        errors = report["errors"].strip()
        wrote = f", and wrote {short(errors[-100:])} to standard error" if errors else ""
        if report["ended"] is not None:
            return scoring.fail(i, f"{report['ended']} and was ended{wrote}")
        if report["status"]:
            return scoring.fail(i, f"{_how(report['status'])}{wrote}")
        lines = report["output"].strip().splitlines()
        if not lines:
            return scoring.fail(i, f"wrote nothing to standard output, expected a number{wrote}")
        for read in (json.loads, float):
            with contextlib.suppress(ValueError, RecursionError):
                return read(lines[-1])
        return scoring.fail(
            i,
            f"wrote {short(lines[-1])} as its last line, expected a number or a JSON object of"
            f" numbers with 'reward'{wrote}",
        )

    # ---- one process ------------------------------------------------------------------------

    def _supervised(
        self, row: Mapping[str, Any], given_up: threading.Event
    ) -> dict[str, Any] | None:
        """What the supervisor reports of the program; None where it was killed itself."""
        folder = tempfile.mkdtemp(prefix="rlhf-flows-reward-")
        mark = uuid.uuid4().hex
        kept = {name: os.environ[name] for name in self.environment if name in os.environ}
        job = {
            "argv": self.command,
            "input": f"{json.dumps(row)}\n",
            "folder": folder,
            "environment": {
                "PATH": os.environ.get("PATH", os.defpath),
                "LANG": "C.UTF-8",
                **kept,
                "HOME": folder,
                "TMPDIR": folder,
                _MARK: mark,
            },
            "timeout_s": self.timeout_s,
            "memory_bytes": self.memory_mb * _MEBIBYTE,
            "output_bytes": self.output_bytes,
            "max_processes": self.max_processes,
        }
        report = None
        try:
            answer = _ask(json.dumps(job).encode() + b"\n", self.timeout_s + _ENDING_S, given_up)
            report = json.loads(answer) if answer else None
        finally:
            if report is None:
                _end_marked(mark)
            if os.path.isdir(folder):
                remove_folder(folder)
        return report


def _absolute(i: int, part: str) -> str:
    is_path = os.sep in part if i == 0 else Path(part).exists()
    return os.path.abspath(part) if part and is_path else part


def _how(status: int) -> str:
    if status > 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _ask(job: bytes, timeout_s: float, given_up: threading.Event) -> bytes:
    """What a supervisor answers to a job; nothing where it was killed."""
    deadline = time.monotonic() + timeout_s
    answer = bytearray()
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        start_new_session=True,  # a Ctrl-C is for who asked
    )
    with supervisor:
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(job)
            supervisor.stdin.flush()
        pipe = supervisor.stdout.fileno()
        poll = select.poll()  # not select(): its file numbers end at 1024
        poll.register(pipe, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            if given_up.is_set() and not supervisor.stdin.closed:
                supervisor.stdin.close()  # by which it knows
            if poll.poll(1000 * min(0.1, left_s)):
                if not (found := os.read(pipe, 1 << 16)):
                    return bytes(answer)
                answer += found
        supervisor.kill()
    return b""


def _end_marked(mark: str) -> None:
    """Ends what a supervisor left that was killed, as by a program that kills its parent."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()
