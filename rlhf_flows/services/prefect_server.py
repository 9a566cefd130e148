"""A Prefect server for one process, where none is configured.

Prefect brings an ephemeral server of its own; this one differs in three things that a person
notices: its pages can be opened while the run goes on, it takes a port that was free a moment
before, and it ends with its process however that ends, a `kill -9` included. The database is the
one of `prefect server start`, so that a later server shows the same runs.
"""

from __future__ import annotations

import atexit
import concurrent.futures
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
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from rlhf_flows.errors import ConfigError, WaitTimeoutError
from rlhf_flows.services.environment import PRIVATE, is_server_configured

__all__ = [
    "PrefectServer",
    "check_configured_server",
    "end_events",
    "kept_prefect_api",
    "prefect_api",
]

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 3.0
_EVENTS_TIMEOUT_S = 5.0
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
    def is_running(self) -> bool:
        return self._process.poll() is None

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
            **PRIVATE,
            "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
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
            if not self.is_running:
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
        """Ends the process, which writes what it still holds and what this one still says."""
        if self.is_running:
            end_events(_EVENTS_TIMEOUT_S)
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def end_events(timeout_s: float) -> None:
    """Sends the events that this process still holds, and forgets the server they go to.

    Prefect has one sender of events a process, for the first server it met. Left alone, it tries
    each event of a later server for 1.5 s at the address of the first, and the process waits for
    them all before it exits. What is not sent in time is dropped: a server that is gone needs none.
    """
    if "prefect.events.worker" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker

    with EventsWorker._instance_lock:
        workers = list(EventsWorker._instances.values())  # type: ignore[misc]  # of any event
        ending = [worker._drain(at_exit=True) for worker in workers]
    concurrent.futures.wait(ending, timeout=timeout_s)
    for worker in workers:
        with suppress(queue.Empty):
            while worker._queue.get_nowait() is not None:
                worker._queue.task_done()
        worker._queue.put_nowait(None)  # the end that it waits for, maybe just taken


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_configured_server() -> None:
    """Asks the server that is configured, if one is. Raises ConfigError where nobody answers."""
    if not is_server_configured():
        return
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        if isinstance(error, httpx.TransportError):
            raise ConfigError(
                f"the Prefect server at {client.api_url} does not answer ({error}): start it with"
                " `prefect server start`, set PREFECT_API_URL to one that runs, or unset it"
                " (`prefect config unset PREFECT_API_URL`) to have one for this run alone"
            ) from error


@contextmanager
def prefect_api() -> Iterator[PrefectServer | None]:
    """Within it Prefect has a server: the one that is configured, else one of this process."""
    if is_server_configured():
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
    if is_server_configured():
        yield None
        return
    with _used(_kept_server()) as server:
        yield server


@contextmanager
def _used(server: PrefectServer) -> Iterator[PrefectServer]:
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_UI_URL: server.url}):
        yield server


_kept: list[PrefectServer] = []
_starting = threading.Lock()


def _kept_server() -> PrefectServer:
    """The server of this process, until it exits; another one where that has ended."""
    with _starting:
        if not (_kept and _kept[-1].is_running):
            end_events(timeout_s=0)  # of the one before
            _kept.append(_started_in_lasting_thread())
        return _kept[-1]


def _started_in_lasting_thread() -> PrefectServer:
    started: queue.SimpleQueue[PrefectServer | Exception] = queue.SimpleQueue()

    def hold() -> None:
        try:
            started.put(PrefectServer())
        except Exception as e:  # whatever it is, somebody waits for an answer
            started.put(e)
            return
        # Linux ends a child with the thread that started it, and threads of callers come and go.
        threading.Event().wait()

    threading.Thread(target=hold, name="rlhf_flows Prefect server", daemon=True).start()
    server = started.get()
    if isinstance(server, Exception):
        raise server
    atexit.register(server.stop)
    return server
