"""An S3 server to test with: moto in this process, behind a door that can misbehave.

Also the server of the environment, that tests marked `s3` use. Fixtures that any room may ask for
are made known by `tests/conftest.py`.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

SECRET = "testing-s3cr3t-of-no-worth"
"""Unlike any other word, so that it can be looked for where it must not be."""
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
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield door
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def bucket(s3_server: FaultyS3) -> str:
    import s3fs

    name = f"bucket-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return name


@contextmanager
def real_bucket() -> Iterator[str]:
    """A bucket of its own on the server of the environment, which points there meanwhile."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in REAL_S3.items():
            patch.setenv(name, value)
        server = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        name = f"rlhf-flows-tests-{uuid4().hex[:12]}"
        server.mkdir(name)
        yield name
        server.rm(name, recursive=True)
