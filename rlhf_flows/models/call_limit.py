"""A time limit on plain Python calls.

The decision here: the call stays in its own thread, and an exception is raised inside it. In the
main thread (where a worker runs its module) an alarm does it, which also ends sleeps, waits for
sockets and regular expressions; in any other thread the interpreter does it between two
instructions. No thread is left hanging and no process is forked under torch. What never comes back
to the interpreter (a loop in C) is beyond its reach: there the shard's limit ends the worker.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["OutOfTimeError", "call_within"]

_AGAIN_S = 1.0
"""Pause between alarms: the first may be swallowed by a bare `except:`."""


class _OutOfTime(BaseException):
    """Raised inside the call; not an Exception, so that `except Exception` lets it pass."""


class OutOfTimeError(Exception):
    """The call took longer than its limit."""


def call_within(timeout_s: float | None, call: Callable[[], Any]) -> Any:
    """What `call()` returns or raises; without a limit where `timeout_s` is None.

    Raises OutOfTimeError where it took longer, also if it came back in the end.
    """
    if timeout_s is None:
        return call()
    if threading.current_thread() is threading.main_thread():
        limit: _Alarm | _Timer = _Alarm(timeout_s)
    else:
        limit = _Timer(timeout_s)
    try:
        returned = limit.run(call)
    except _OutOfTime as e:
        raise OutOfTimeError(f"it took longer than {timeout_s:g} s") from e
    if limit.is_over:
        raise OutOfTimeError(f"it took longer than {timeout_s:g} s")
    return returned


class _Alarm:
    """By SIGALRM, in the main thread."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._is_running = False
        self.is_over = False

    def run(self, call: Callable[[], Any]) -> Any:
        before = signal.signal(signal.SIGALRM, self._ring)
        began = time.monotonic()
        self._is_running = True
        left_s, every_s = signal.setitimer(signal.ITIMER_REAL, self._timeout_s, _AGAIN_S)
        try:
            return call()
        finally:
            self._is_running = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if left_s:  # somebody else's alarm goes on, and rings at once if it is due
                left_s = max(left_s - (time.monotonic() - began), 1e-6)
                signal.setitimer(signal.ITIMER_REAL, left_s, every_s)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._is_running:
            self.is_over = True
            raise _OutOfTime


class _Timer:
    """By another thread, which has the interpreter raise in this one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._thread_id = ctypes.c_ulong(threading.get_ident())
        self._lock = threading.Lock()
        self._is_running = True
        self.is_over = False

    def run(self, call: Callable[[], Any]) -> Any:
        timer = threading.Timer(self._timeout_s, self._ring)
        timer.daemon = True
        timer.start()
        try:
            return call()
        finally:
            with self._lock:
                self._is_running = False
                if self.is_over:  # asked for and perhaps not raised yet: it must not come later
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, None)
            timer.cancel()

    def _ring(self) -> None:
        with self._lock:
            if self._is_running:
                self.is_over = True
                raised = ctypes.py_object(_OutOfTime)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread_id, raised)
