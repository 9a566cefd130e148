"""Stores to test with: a folder, and an S3 server (moto) behind a door that can misbehave."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from rlhf_flows.store import ObjectStore, open_store

REPOSITORY = Path(__file__).parents[2]
REAL_S3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
"""Of the server that tests marked `s3` use; the fixtures here point the environment elsewhere."""


class FaultyS3:
    """A WSGI door before moto. Requests pass one by one: moto's own check-then-put can race."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.fault: str | None = None
        self.faults_left = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        conditional = environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ
        if not conditional or self.fault is None or self.faults_left == 0:
            return self._pass(environ, start_response)
        self.faults_left -= 1
        return getattr(self, self.fault)(environ, start_response)

    def _pass(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        with self.lock:
            return list(self.app(environ, start_response))

    def _status(self, environ: dict[str, Any]) -> str:
        """Let the request take effect, tell nobody."""
        seen: list[str] = []
        self._pass(environ, lambda status, _headers, _info=None: seen.append(status))
        return seen[0]

    def _answer(self, start_response: Any, status: str, body: str = "") -> list[bytes]:
        start_response(status, [("Content-Type", "application/xml")])
        return [body.encode()]

    def ignores_condition(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        del environ["HTTP_IF_NONE_MATCH"]
        return self._pass(environ, start_response)

    def hasty(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """Refuses what is there already, yet lets two simultaneous writers both win."""
        del environ["HTTP_IF_NONE_MATCH"]
        head = {"REQUEST_METHOD": "HEAD", "CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO()}
        if self._status(environ | head).startswith("200"):
            return self._answer(start_response, "412 Precondition Failed")
        time.sleep(0.02)
        return self._pass(environ, start_response)

    def loses_reply(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        self._status(environ)
        return self._answer(start_response, "500 Internal Server Error")

    def bare_412(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """As Ceph says it: no <Condition> that would tell which header failed."""
        if self._status(environ).startswith("412"):
            body = "<?xml version='1.0'?><Error><Code>PreconditionFailed</Code></Error>"
            return self._answer(start_response, "412 Precondition Failed", body)
        return self._answer(start_response, "200 OK")

    def conflicts(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """As AWS says it while another conditional write is in flight; nothing is written."""
        body = "<?xml version='1.0'?><Error><Code>ConditionalRequestConflict</Code></Error>"
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        return self._answer(start_response, "409 Conflict", body)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultyS3]:
    """A server on a free port of the loopback device; the environment points to it."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    door = FaultyS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield door
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def s3_fault(s3_server: FaultyS3) -> Iterator[Callable[..., None]]:
    """Switches on a fault of the server, for the next `times` conditional PUTs."""

    def switch(fault: str, *, times: int = 1_000_000) -> None:
        s3_server.fault, s3_server.faults_left = fault, times

    yield switch
    s3_server.fault = None


@pytest.fixture(scope="session")
def bucket(s3_server: FaultyS3) -> str:
    import s3fs

    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return name


@pytest.fixture
def local_store(tmp_path: Path) -> ObjectStore:
    return open_store(tmp_path / "store")


@pytest.fixture
def s3_store(bucket: str) -> ObjectStore:
    return open_store(f"s3://{bucket}/some/{uuid4().hex}")


@pytest.fixture
def real_s3_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """On the server of the environment, in a bucket of its own."""
    import s3fs

    for name, value in REAL_S3.items():
        monkeypatch.setenv(name, value)
    server = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    bucket = f"rlhf-flows-tests-{uuid4().hex[:12]}"
    server.mkdir(bucket)
    yield open_store(f"s3://{bucket}/some/folder")
    server.rm(bucket, recursive=True)


@pytest.fixture(
    params=["local_store", "s3_store", pytest.param("real_s3_store", marks=pytest.mark.s3)]
)
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store in turn: what a test says of `store` holds for both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -c code arguments…`; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
