"""An HTTP proxy that spoils requests by rule, between a store and the S3 server of the tests.

It runs in a thread of its own and forwards what it does not spoil as it is, the Host header
included, so that signatures still hold. What it did to each request is in `seen`.
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from yarl import URL

Fault = Literal[
    "500",
    "503",
    "429",
    "403",
    "404",
    "delay",
    "reset",
    "lost reply",
    "late",
    "cut",
    "ignores condition",
    "hasty",
    "outage",
]
PASSING: tuple[Fault, ...] = ("500", "503", "429", "delay", "reset", "lost reply", "late", "cut")
"""Faults that a store with patience gets over."""
_ERRORS = {
    "500": (500, "<Error><Code>InternalError</Code><Message>We failed.</Message></Error>"),
    "503": (503, "<Error><Code>SlowDown</Code><Message>Slower, please.</Message></Error>"),
    "429": (429, "<html>too many requests</html>"),
    "403": (403, "<Error><Code>SignatureDoesNotMatch</Code></Error>"),
    "404": (404, "<Error><Code>NoSuchUpload</Code></Error>"),
}


@dataclass(slots=True, kw_only=True)
class Rule:
    """Spoils the requests that match, by one of its faults."""

    faults: tuple[Fault, ...]
    method: str = ""
    path: str = ""
    """A regular expression, looked for in path and query."""
    skip: int = 0
    """Matching requests that pass before the first is spoilt."""
    times: int = 1_000_000_000
    share: float = 1.0
    seconds: float = 0.2
    """Of a delay or an outage."""


class Seen(NamedTuple):
    method: str
    path: str
    fault: Fault | Literal["away"] | None


class FaultyProxy:
    """Rules may be added and removed at any time; of several that match, the first counts."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.rules: list[Rule] = []
        self.random = random.Random(0)
        self.seen: list[Seen] = []
        self._away_until_s = 0.0
        self._in_flight: Counter[str] = Counter()

    def spoil(self, *faults: Fault, **how: object) -> None:
        self.rules.append(Rule(faults=faults, **how))  # type: ignore[arg-type]

    def go_away(self, seconds: float = 1e9) -> None:
        """From now on, and for so long, every connection is reset."""
        self._away_until_s = time.monotonic() + seconds

    def come_back(self) -> None:
        self._away_until_s = 0.0

    def faults(self) -> Counter[str]:
        """How often each fault was met."""
        return Counter(seen.fault for seen in self.seen if seen.fault)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault, seconds = self._fault_of(request)
        self.seen.append(Seen(request.method, request.raw_path, fault))
        match fault:
            case None:
                return await self._forward(request, body)
            case "away" | "reset":
                return _reset(request)
            case "lost reply":
                await self._forward(request, body)
                return _reset(request)
            case "outage":
                self.go_away(seconds)
                return _reset(request)
            case "late":
                _reset(request)
                await asyncio.sleep(seconds)
                return await self._forward(request, body)
            case "delay":
                await asyncio.sleep(seconds)
                return await self._forward(request, body)
            case "cut":
                return await _cut(request, await self._forward(request, body))
            case "ignores condition":
                return await self._forward(request, body, drop="If-None-Match")
            case "hasty":
                return await self._hasty(request, body)
            case error:
                status, text = _ERRORS[error]
                return web.Response(status=status, text=text, content_type="application/xml")

    def _fault_of(self, request: web.Request) -> tuple[Fault | Literal["away"] | None, float]:
        if time.monotonic() < self._away_until_s:
            return "away", 0.0
        path = unquote(request.raw_path)
        for rule in self.rules:
            if rule.method not in ("", request.method) or not re.search(rule.path, path):
                continue
            if rule.skip:
                rule.skip -= 1
            elif rule.times and self.random.random() < rule.share:
                rule.times -= 1
                return self.random.choice(rule.faults), rule.seconds
        return None, 0.0

    async def _hasty(self, request: web.Request, body: bytes) -> web.Response:
        """Keeps the condition of one writer after the other, and not of simultaneous ones."""
        self._in_flight[request.path] += 1
        try:
            await asyncio.sleep(0.02)
            alone = self._in_flight[request.path] == 1
            return await self._forward(request, body, drop="" if alone else "If-None-Match")
        finally:
            self._in_flight[request.path] -= 1

    async def _forward(self, request: web.Request, body: bytes, *, drop: str = "") -> web.Response:
        headers = request.headers.copy()
        for name in ("Connection", "Expect", "Transfer-Encoding", drop):
            headers.popall(name, None)
        url = URL(f"{self.upstream}{request.raw_path}", encoded=True)
        async with self.session.request(
            request.method, url, headers=headers, data=io.BytesIO(body), allow_redirects=False
        ) as reply:
            answer = await reply.read()
        kept = reply.headers.copy()
        for name in ("Connection", "Content-Length", "Transfer-Encoding", "Date", "Server"):
            kept.popall(name, None)
        if request.method == "HEAD":
            kept["Content-Length"] = reply.headers.get("Content-Length", "0")
        return web.Response(status=reply.status, headers=kept, body=answer)

    async def run(self, started: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{key:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(auto_decompress=False) as self.session:
            started.set()
            await stop.wait()
            await runner.cleanup()


def _reset(request: web.Request) -> web.Response:
    """A TCP reset; the response is for nobody."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, whole: web.Response) -> web.StreamResponse:
    """Promises the whole body, sends half of it."""
    assert isinstance(whole.body, bytes)
    cut = web.StreamResponse(status=whole.status, headers=whole.headers)
    cut.content_length = len(whole.body)
    await cut.prepare(request)
    await cut.write(whole.body[: len(whole.body) // 2])
    assert request.transport is not None
    request.transport.close()
    return cut


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at `upstream`, at `.url`, without rules yet."""
    proxy = FaultyProxy(upstream)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(proxy.run(started, stop),), name="faulty proxy"
    )
    thread.start()
    try:
        assert started.wait(10), "the proxy did not start"
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
