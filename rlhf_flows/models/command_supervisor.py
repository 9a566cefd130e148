"""Runs one program and lets nothing of it live on: a process of its own, started for each sample.

`python -I -S command_supervisor.py` reads one JSON line (`argv`, `input`, `folder`, `environment`,
`timeout_s`, `memory_bytes`, `output_bytes`, `max_processes`) and writes one: `output`, `errors`
(the end of what the program wrote there), `status` (negative: a signal), or `ended` (why it was
ended here), or `refused` (it could not be started).

The decision here: this process is a subreaper (prctl(2), Linux), so whatever descends from the
program stays below it, also where it forks twice and takes a session of its own. A kernel that says
"no child" has therefore said that nothing is left. End of file on standard input means that who
asked is gone: all is ended then, too. Imports the standard library alone, to start in a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_EVERY_S = 0.025
_KEPT_ERROR_BYTES = 4096
_READ_BYTES = 1 << 16
_ENDING_S = 10.0
_MEBIBYTE = 1 << 20


def main() -> None:
    """One job from standard input, its report to standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    job = json.loads(sys.stdin.buffer.readline())
    try:
        report = _Program(job).run()
    finally:
        end_descendants()
        remove_folder(job["folder"])
    sys.stdout.write(json.dumps(report))


class _Program:
    """A program at work: its pipes, its limits."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.output, self.errors = bytearray(), bytearray()
        self.unsent = memoryview(job["input"].encode())
        self.ended: str | None = None
        self.selector = selectors.DefaultSelector()

    def run(self) -> dict[str, Any]:
        job = self.job
        try:
            process = subprocess.Popen(
                job["argv"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=job["folder"],
                env=job["environment"],
                start_new_session=True,
                preexec_fn=self._limit,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            return {"refused": f"{type(e).__name__}: {e}"}
        self._watch(process)
        status = self._until_it_ends(process)
        if self.ended is None:
            self._drain(process)
        return {
            "status": status,
            "ended": self.ended,
            "output": self.output[: job["output_bytes"]].decode(errors="replace"),
            "errors": self.errors.decode(errors="replace"),
        }

    def _limit(self) -> None:
        """In the new process, before the program is there."""
        memory, cpus = self.job["memory_bytes"], os.cpu_count() or 1
        # DATA counts what a process may write, AS whatever it reserves: many runtimes (Go, Java,
        # Node) reserve far more than they ever use.
        _set_limit(resource.RLIMIT_DATA, memory)
        _set_limit(resource.RLIMIT_FSIZE, memory)
        _set_limit(resource.RLIMIT_CORE, 0)
        _set_limit(resource.RLIMIT_CPU, int(self.job["timeout_s"] * cpus) + 2)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for pipe, event, act in (
            (process.stdin, selectors.EVENT_WRITE, self._send),
            (process.stdout, selectors.EVENT_READ, self._take_output),
            (process.stderr, selectors.EVENT_READ, self._take_errors),
            (sys.stdin.buffer, selectors.EVENT_READ, self._asker_is_gone),
        ):
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, event, act)
        # A child that ends wakes the selector, so that nobody waits for the next look.
        woken, wakes = os.pipe()
        for end in (woken, wakes):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        self.selector.register(woken, selectors.EVENT_READ, lambda _: os.read(woken, 512))

    def _until_it_ends(self, process: subprocess.Popen[bytes]) -> int | None:
        """Its status, or None where it was ended for a reason."""
        deadline = time.monotonic() + self.job["timeout_s"]
        next_look = 0.0
        while self.ended is None:
            if (status := _reap(process.pid)) is not None:
                process.returncode = status
                return status
            now = time.monotonic()
            if now >= deadline:
                self.ended = f"took longer than {self.job['timeout_s']:g} s"
                break
            if now >= next_look:
                self._look()
                next_look = time.monotonic() + _LOOK_EVERY_S
            for key, _ in self.selector.select(min(_LOOK_EVERY_S, deadline - now)):
                key.data(key.fileobj)
        return None

    def _look(self) -> None:
        """At memory and number of all that descends from here."""
        processes = list(descendants())
        limit = self.job["memory_bytes"]
        if len(processes) > self.job["max_processes"]:
            self.ended = f"started more than {self.job['max_processes']} processes"
        # Pages that processes share count in each of them: where that is too much, they are shared
        # out, which takes longer to find.
        elif _sum(processes, _resident_bytes) > limit and _sum(processes, _own_bytes) > limit:
            self.ended = f"used more than {limit // _MEBIBYTE} MiB of memory"

    # ---- pipes ------------------------------------------------------------------------------

    def _send(self, pipe: Any) -> None:
        try:
            self.unsent = self.unsent[os.write(pipe.fileno(), self.unsent[:_READ_BYTES]) :]
        except BlockingIOError:
            return
        except OSError:  # it reads no more: its own affair
            self.unsent = self.unsent[:0]
        if not self.unsent:
            self._close(pipe)

    def _take_output(self, pipe: Any) -> None:
        self.output += self._read(pipe)
        if len(self.output) > self.job["output_bytes"]:
            self.ended = f"wrote more than {self.job['output_bytes']} bytes to standard output"

    def _take_errors(self, pipe: Any) -> None:
        self.errors += self._read(pipe)
        del self.errors[:-_KEPT_ERROR_BYTES]

    def _asker_is_gone(self, pipe: Any) -> None:
        if not os.read(pipe.fileno(), 1):
            self.ended = "was given up"

    def _read(self, pipe: Any) -> bytes:
        try:
            found = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return b""
        if not found:
            self._close(pipe)
        return found

    def _close(self, pipe: Any) -> None:
        self.selector.unregister(pipe)
        pipe.close()

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """What lies in the pipes of a program that ended; others may hold them open for ever."""
        for pipe, take in (
            (process.stdout, self._take_output),
            (process.stderr, self._take_errors),
        ):
            for _ in range(16 * _MEBIBYTE // _READ_BYTES):  # a pipe holds a MiB at most
                assert pipe is not None
                if pipe.closed or self.ended is not None:
                    break
                before = len(self.output), bytes(self.errors)
                take(pipe)
                if before == (len(self.output), bytes(self.errors)):
                    break


def _set_limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (value, value))


# ---- processes ------------------------------------------------------------------------------


def _reap(pid: int) -> int | None:
    """Takes note of all children that ended; the status of `pid`, if it is one of them."""
    found = None
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                found = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        pass
    return found


def descendants() -> Iterator[int]:
    """Ids of all processes below this one that are there now."""
    here = os.getpid()
    children = _children if os.path.exists(f"/proc/{here}/task/{here}/children") else _searched()
    unseen, seen = [here], set()
    while unseen:
        for child in children(unseen.pop()):
            if child not in seen:
                seen.add(child)
                unseen.append(child)
                yield child


def _children(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())
        except OSError:  # it ended meanwhile
            continue


def _searched() -> Callable[[int], list[int]]:
    """The same, where the kernel keeps no list of children: all processes are asked."""
    below: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        below.setdefault(parent, []).append(int(name))
    return lambda pid: below.get(pid, [])


def end_descendants() -> None:
    """Kills all of them, and waits until the kernel says that there is none."""
    deadline = time.monotonic() + _ENDING_S
    while time.monotonic() < deadline:
        # Stopped first, all of them: who is stopped cannot fork while others are killed.
        stopped: set[int] = set()
        while fresh := set(descendants()) - stopped:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            _signal(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # there is none
            return
        time.sleep(0.001)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _sum(processes: list[int], measure: Callable[[int], int]) -> int:
    return sum(measure(pid) for pid in processes)


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _own_bytes(pid: int) -> int:
    """Resident bytes with shared pages shared out (PSS)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = file.read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return _resident_bytes(pid)


def remove_folder(folder: str) -> None:
    """Also where its program took away the right to write into a folder below."""

    def allow_and_retry(function: Callable[..., Any], path: str, _: Any) -> None:
        try:
            if path.startswith(f"{folder}/"):
                os.chmod(os.path.dirname(path), stat.S_IRWXU)
            if os.path.isdir(path) and not os.path.islink(path):  # never what a link points to
                os.chmod(path, stat.S_IRWXU)
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        except OSError:
            pass

    shutil.rmtree(folder, onerror=allow_and_retry)


if __name__ == "__main__":
    main()
