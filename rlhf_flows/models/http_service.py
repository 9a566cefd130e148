"""One address over HTTP: a request, its limits, and what may be said of what came back.

The decision here: whatever is no list of rewards is `Refused`, with whether another try may help.
No text that leaves here holds the token, also where the service repeats it.
"""

from __future__ import annotations

import asyncio
import json
import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from rlhf_flows.models.reward_results import short

__all__ = ["Refused", "Service", "public_url"]

_PASSING = frozenset({429, 500, 502, 503, 504})
_SHOWN_CHARACTERS = 200


class Refused(Exception):
    """The service gave no usable answer; the message goes on from "reward service ..."."""

    def __init__(self, what: str, *, may_pass: bool = False, pause_s: float = 0.0) -> None:
        super().__init__(what)
        self.may_pass = may_pass
        self.pause_s = pause_s
        """Shortest pause that the service asked for."""


class Service:
    """Requests to one address. No text that leaves it holds the token."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, token: str | None, answer_bytes: int
    ) -> None:
        self._client = client
        self._url = url
        self._token = token
        self._answer_bytes = answer_bytes

    async def ask(self, body: bytes, timeout_s: float, count: int) -> list[Any]:
        """One request, one list of `count` rewards. Raises Refused."""
        try:
            # httpx bounds the wait for each piece; a service that drips bytes takes for ever.
            async with (
                asyncio.timeout(timeout_s),
                self._client.stream("POST", self._url, content=body) as response,
            ):
                answer = self._hidden(await self._read(response))
        except (TimeoutError, httpx.TimeoutException):
            raise Refused(f"did not answer within {timeout_s:.3g} s", may_pass=True) from None
        except (httpx.ConnectError, httpx.ProxyError) as e:
            raise Refused(f"cannot be reached ({self._said(e)})", may_pass=True) from None
        except (httpx.NetworkError, httpx.RemoteProtocolError) as e:
            raise Refused(f"broke the connection ({self._said(e)})", may_pass=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise Refused(f"cannot be asked ({self._said(e)})") from None
        if not response.is_success:
            raise self._refusal(response, answer)
        return _rewards_of(answer, count)

    async def _read(self, response: httpx.Response) -> bytes:
        answer = bytearray()
        async for piece in response.aiter_raw():  # as sent: a small piece may unpack to gigabytes
            answer += piece
            if len(answer) > self._answer_bytes:
                raise Refused(
                    f"answered more than {self._answer_bytes} bytes with status"
                    f" {response.status_code}: {_first_words(self._hidden(bytes(answer)))}"
                )
        return bytes(answer)

    def _refusal(self, response: httpx.Response, answer: bytes) -> Refused:
        what = f"answered with status {response.status_code}"
        if response.is_redirect:
            to = public_url(response.headers.get("location", ""))
            shown = self._hidden(to.encode()).decode()
            return Refused(f"{what}, a redirect to {shown!r}: give the address itself as url")
        return Refused(
            f"{what}: {_first_words(answer)}",
            may_pass=response.status_code in _PASSING,
            pause_s=_retry_after_s(response.headers.get("retry-after")),
        )

    def _said(self, error: Exception) -> str:
        said = self._hidden(str(error).encode(errors="replace")).decode(errors="replace")
        return f"{type(error).__name__}: {said}" if said else type(error).__name__

    def _hidden(self, text: bytes) -> bytes:
        return text if self._token is None else text.replace(self._token.encode(), b"[token]")


def public_url(url: str) -> str:
    """The address without user, password, query and fragment, any of which may be a credential."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _rewards_of(answer: bytes, count: int) -> list[Any]:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        raise Refused(
            f"answered what is not JSON with status 200: {_first_words(answer)}"
        ) from None
    rewards = found.get("rewards") if isinstance(found, dict) else None
    if not isinstance(rewards, list):
        raise Refused(
            f'answered without a list, expected {{"rewards": [...]}}: {_first_words(answer)}'
        )
    if len(rewards) != count:
        raise Refused(
            f"answered {len(rewards)} rewards, expected one for each of {count} samples:"
            f" {_first_words(answer)}"
        )
    return rewards


def _first_words(answer: bytes) -> str:
    text = answer[: 4 * _SHOWN_CHARACTERS].decode(errors="replace")[:_SHOWN_CHARACTERS]
    return short(text) if text else "an empty body"


def _retry_after_s(value: str | None) -> float:
    """Seconds, given as a number or as a date (RFC 9110, 10.2.3); 0 for anything else."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
