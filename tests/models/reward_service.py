"""A real HTTP server in a thread, as good or as bad as a test says by the path of its address."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["RewardService"]

Answer = Callable[["_Handler", list[dict[str, Any]]], None]


class RewardService:
    """`with RewardService() as service:` serves `service.url + "/<name of an answer>"`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], list[dict[str, Any]]]] = []
        """Path, headers and samples of each that came in."""
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.service = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.is_closing = threading.Event()

    def __enter__(self) -> RewardService:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, path: str) -> int:
        return Counter(path for path, _, _ in self.requests)[path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def service(self) -> RewardService:
        found = self.server.service  # type: ignore[attr-defined]
        assert isinstance(found, RewardService)
        return found

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        samples = json.loads(body)["samples"]
        with self.service.lock:
            self.service.requests.append((self.path, dict(self.headers), samples))
            self.service.in_flight += 1
            self.service.most_in_flight = max(self.service.most_in_flight, self.service.in_flight)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                ANSWERS[self.path.partition("?")[0].lstrip("/")](self, samples)
        finally:
            with self.service.lock:
                self.service.in_flight -= 1

    def answer(self, body: str | bytes, status: int = 200, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"content_length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def rewards(self, values: Any, status: int = 200) -> None:
        self.answer(json.dumps({"rewards": values}), status)

    def drips(self) -> Iterator[None]:
        while not self.service.is_closing.wait(0.02):
            yield

    def log_message(self, *_: object) -> None: ...


def _lengths(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.rewards([len(s["completion"]) for s in samples])


def _slow(h: _Handler, samples: list[dict[str, Any]]) -> None:
    time.sleep(0.1)
    _lengths(h, samples)


def _hangs(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.service.is_closing.wait(60)


def _parts(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.rewards([{"reward": 1.0, "length": len(s["completion"])} for s in samples])


def _picky(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.rewards([None if s["completion"] == "bad" else 1.0 for s in samples])


def _away_twice(h: _Handler, samples: list[dict[str, Any]]) -> None:
    if h.service.count(h.path) <= 2:
        h.answer("starting", 500)
    else:
        _lengths(h, samples)


def _busy_once(h: _Handler, samples: list[dict[str, Any]]) -> None:
    if h.service.count(h.path) <= 1:
        h.answer("later", 429, retry_after="1")
    else:
        _lengths(h, samples)


def _closes_once(h: _Handler, samples: list[dict[str, Any]]) -> None:
    if h.service.count(h.path) <= 1:
        h.close_connection = True
    else:
        _lengths(h, samples)


def _drips(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.send_response(200)
    h.send_header("transfer-encoding", "chunked")
    h.end_headers()
    for _ in h.drips():
        h.wfile.write(b"1\r\n \r\n")


def _endless(h: _Handler, samples: list[dict[str, Any]]) -> None:
    h.send_response(200)
    h.send_header("content-length", str(1 << 40))
    h.end_headers()
    while not h.service.is_closing.is_set():
        h.wfile.write(b"[" * 65536)


def _bad_and_good(h: _Handler, samples: list[dict[str, Any]]) -> None:
    """The request with a sample "bad" is a server's error; of a run, the digits 3."""
    if any(s["completion"] in ("bad", "3") for s in samples):
        h.answer("cannot judge this", 500)
    else:
        h.rewards([1.0 for _ in samples])


ANSWERS: dict[str, Answer] = {
    "lengths": _lengths,
    "slow": _slow,
    "hangs": _hangs,
    "parts": _parts,
    "picky": _picky,
    "away_twice": _away_twice,
    "busy_once": _busy_once,
    "closes_once": _closes_once,
    "closes": lambda h, _: setattr(h, "close_connection", True),
    "busy_for_an_hour": lambda h, _: h.answer("later", 503, retry_after="3600"),
    "away": lambda h, _: h.answer("out of memory", 500),
    "refuses": lambda h, _: h.answer("no such model", 404),
    "forbids": lambda h, _: h.answer(f"you sent {h.headers['authorization']}!", 401),
    "repeats": lambda h, s: h.rewards([str(h.headers["authorization"]) for _ in s]),
    "moved": lambda h, _: h.answer("", 302, location="http://user:pass@elsewhere/x?key=secret"),
    "nonsense": lambda h, _: h.answer("<html>welcome</html>"),
    "nothing": lambda h, _: h.answer(""),
    "a_list": lambda h, s: h.answer(json.dumps([1.0 for _ in s])),
    "other_keys": lambda h, s: h.answer(json.dumps({"scores": [1.0 for _ in s]})),
    "too_few": lambda h, s: h.rewards([1.0 for _ in s][1:]),
    "nan": lambda h, s: h.rewards([float("nan") for _ in s]),
    "text": lambda h, s: h.rewards(["9" for _ in s]),
    "drips": _drips,
    "endless": _endless,
    "deep": lambda h, _: h.answer("[" * 200_000),
    "bad_and_good": _bad_and_good,
}
