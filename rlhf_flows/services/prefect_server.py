"""A Prefect server for one process, where none is configured.

Prefect brings an ephemeral server of its own; this one differs in three things that a person
notices: its pages can be opened while the run goes on, it takes a port that is free for certain,
and it ends with its process however that ends, a `kill -9` included. The database is the one of
`prefect server start`, so that a later server shows the same runs.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rlhf_flows.errors import WaitTimeoutError

__all__ = ["PrefectServer", "kept_prefect_api", "prefect_api"]

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 3.0
_PR_SET_PDEATHSIG = 1
_IDLE_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "CANCELLATION_CLEANUP",
    "PAUSE_EXPIRATIONS",
    "FOREMAN",
    "REPOSSESSOR",
    "TRIGGERS",
)
"""What schedules, watches workers or fires automations: of no use to one run."""
_PRIVATE = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
"""A server that ends with its process has nobody to report to."""
_RECORDER = {
    # One insert for all that happened within a second, not one for each change of a task's state:
    # 10 ms of CPU time a task instead of 26, and at the end of a run nothing waits to be written.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


class PrefectServer:
    """A server process on loopback."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process = self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    def _start(self) -> subprocess.Popen[bytes]:
        import prefect

        services = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _IDLE_SERVICES}
        environment = {
            **_PRIVATE,
            **os.environ,
            **services,
            **_RECORDER,
            "PREFECT_UI_API_URL": self.api_url,
            "PREFECT_UI_SERVE_BASE": "/",
            "PREFECT__SERVER_FINAL": "1",
        }
        command = [
            *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
            *("--app-dir", str(Path(prefect.__file__).parent.parent)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--log-level", "error", "--lifespan", "on", "--timeout-graceful-shutdown", "1"),
        ]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def wait(self) -> None:
        """Until it answers. Raises WaitTimeoutError."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        code = self._process.poll()
        self.stop()
        raise WaitTimeoutError(
            f"the Prefect server at {self.url} "
            + ("did not answer" if code is None else f"ended with exit code {code}")
            + f" within {_START_TIMEOUT_S:g} s: run `prefect server start` to see why, or set"
            " PREFECT_API_URL to a server that runs"
        )

    def stop(self) -> None:
        """Ends the process, which writes what it still holds."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def prefect_api() -> Iterator[PrefectServer | None]:
    """Within it Prefect has a server: the one that is configured, else one of this process."""
    if _is_configured():
        yield None
        return
    server = PrefectServer()
    try:
        with _used(server):
            yield server
    finally:
        server.stop()


@contextmanager
def kept_prefect_api() -> Iterator[PrefectServer | None]:
    """`prefect_api` for a program that may come again: its server is started once, and kept."""
    if _is_configured():
        yield None
        return
    with _used(_kept_server()) as server:
        yield server


def _is_configured() -> bool:
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


@contextmanager
def _used(server: PrefectServer) -> Iterator[PrefectServer]:
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_UI_URL: server.url}):
        yield server


@cache
def _kept_server() -> PrefectServer:
    """The server of this process, until it exits."""
    started: queue.SimpleQueue[PrefectServer] = queue.SimpleQueue()

    def hold() -> None:
        started.put(PrefectServer())
        # Linux ends a child with the thread that started it, and threads of callers come and go.
        threading.Event().wait()

    threading.Thread(target=hold, name="rlhf_flows Prefect server", daemon=True).start()
    server = started.get()
    atexit.register(server.stop)
    return server
