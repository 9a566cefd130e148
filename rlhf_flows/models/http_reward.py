"""`HTTPReward`: a service scores completions over HTTP.

`POST {"samples": [row, ...]}` is answered by `{"rewards": [number or object of numbers, ...]}`. The
decision here: a service that is away for a moment is asked again, one that is wrong is not, and all
of it is bounded: the time of a request, the time of a batch with all its tries, the size of an
answer. What an error says of the service is its address without credentials, the status and the
first words of its answer, less the token.

The token is read from the worker's environment when it is used (`token_env`), and is no attribute:
a module is pickled into the cluster, and its configuration is kept in run.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.event_loop import run_to_end
from rlhf_flows.models.http_service import Refused, Service, public_url
from rlhf_flows.models.reward_results import Scoring, json_rows
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import OnFailure
from rlhf_flows.together import together

__all__ = ["HTTPReward"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class HTTPReward(BaseModule):
    """Adds `reward` [B] float32, and a column for every other number the service returns."""

    default_threads = 1

    def __init__(
        self,
        name: str = "reward",
        *,
        url: str,
        token_env: str | None = None,
        request_size: int = 16,
        max_concurrency: int = 8,
        timeout_s: float = 60.0,
        total_timeout_s: float | None = None,
        retries: int = 3,
        answer_bytes: int = 1 << 20,
        on_failure: OnFailure = "stop",
        failure_reward: float = 0.0,
    ) -> None:
        """
        Args:
            url: is sent `{"samples": [...]}`, the rows of a batch without their tensors.
            token_env: the environment variable of the worker that holds a bearer token.
            request_size: most samples in one request.
            max_concurrency: most requests at a time.
            timeout_s: longest that one request may take, from its start to its last byte.
            total_timeout_s: longest that a batch may take, with all its requests and their further
                tries; five times `timeout_s` by default.
            retries: further tries of a request that failed for a passing cause: no connection, one
                that breaks, no answer in time, status 429, 500, 502, 503, 504. Pauses double
                from half a second, or are what Retry-After says.
            answer_bytes: most bytes of an answer.
            on_failure: "stop": a request that fails in all its tries, or a sample whose reward is
                no finite number, ends the run. "score": its samples get `failure_reward`, and the
                cause stands in their column `reward_failure`.
        """
        super().__init__(name)
        self.url = url
        self.token_env = token_env
        self.request_size = request_size
        self.max_concurrency = max_concurrency
        self.timeout_s = timeout_s
        self.total_timeout_s = 5 * timeout_s if total_timeout_s is None else total_timeout_s
        self.retries = retries
        self.answer_bytes = answer_bytes
        self.on_failure: OnFailure = on_failure
        self.failure_reward = failure_reward

    def validate(self) -> None:
        """Reads the address and the limits; asks nobody. Raises ConfigError."""
        if "@" in urlsplit(self.url).netloc:
            raise ConfigError(
                f"the url of module {self.name!r} ({public_url(self.url)}) holds a user name or a"
                " password, which would be kept with the run: put a token into an environment"
                " variable of the workers, and name that as token_env"
            )
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ConfigError(
                f"the url of module {self.name!r} is {public_url(self.url)!r}, expected"
                " http://host:port/path or https://..."
            )
        numbers = ("request_size", "max_concurrency", "timeout_s", "total_timeout_s")
        for name in (*numbers, "answer_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} of module {self.name!r} is {getattr(self, name)}, expected more than 0"
                )
        if self.retries < 0:
            raise ConfigError(
                f"retries of module {self.name!r} is {self.retries}, expected 0 or more"
            )
        Scoring.check(self.name, on_failure=self.on_failure, failure_reward=self.failure_reward)

    def setup(self) -> None:
        """Finds the token, so that a worker without it says so at once."""
        self._token()

    def _token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise ConfigError(
                f"the environment variable {self.token_env} (token_env of module {self.name!r}) is"
                f" not set on {socket.gethostname()}: set it where workers start, before `ray"
                " start` or before the run where that starts Ray itself"
            )
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigError(
                f"the environment variable {self.token_env} (token_env of module {self.name!r})"
                " holds spaces or characters that no header can: write the token alone into it"
            )
        return token

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Only the new columns, row by row.

        Raises RewardError: the service gave no usable answer, or what it gave is no reward.
        """
        scoring = Scoring(
            data,
            label=f"reward service {public_url(self.url)} of module {self.name!r}",
            on_failure=self.on_failure,
            failure_reward=self.failure_reward,
        )
        if not scoring.num_samples:
            return scoring.columns_of([])
        return scoring.columns_of(run_to_end(self._all_rows(scoring)))

    async def _all_rows(self, scoring: Scoring) -> list[Any]:
        token = self._token()
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        gate = asyncio.Semaphore(self.max_concurrency)
        deadline = time.monotonic() + self.total_timeout_s
        size, count = self.request_size, scoring.num_samples
        async with (
            httpx.AsyncClient(
                headers=headers,
                follow_redirects=False,
                timeout=self.timeout_s,
                limits=httpx.Limits(max_connections=self.max_concurrency),
            ) as client,
            together() as group,
        ):
            service = Service(client, self.url, token, self.answer_bytes)

            async def one(part: range) -> list[Any]:
                async with gate:
                    try:
                        return await self._rewards(service, scoring, part, deadline)
                    except Refused as e:
                        return [scoring.fail(i, str(e)) for i in part]

            parts = [range(at, min(at + size, count)) for at in range(0, count, size)]
            answers = [group.create_task(one(part)) for part in parts]
        return [reward for answer in answers for reward in answer.result()]

    async def _rewards(
        self, service: Service, scoring: Scoring, part: range, deadline: float
    ) -> list[Any]:
        """Of the samples `part`, in up to `1 + retries` tries. Raises Refused."""
        body = json.dumps({"samples": json_rows(scoring.columns, part)}).encode()
        for tried in range(1, self.retries + 2):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Refused(f"had no time left of the batch's {self.total_timeout_s:g} s")
            try:
                return await service.ask(body, min(self.timeout_s, left_s), len(part))
            except Refused as e:
                tries = f" in each of {tried} tries" if tried > 1 else ""
                if not e.may_pass or tried > self.retries:
                    raise Refused(f"{e}{tries}") from None
                pause_s = max(e.pause_s, _pause_s(tried))
                if time.monotonic() + pause_s >= deadline:
                    raise Refused(
                        f"{e}{tries}, and the next would begin {pause_s:.0f} s later, beyond the"
                        f" batch's {self.total_timeout_s:g} s (total_timeout_s)"
                    ) from None
                await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


def _pause_s(tried: int) -> float:
    """Doubles, less up to a half by chance, so that workers do not come back all at once."""
    # Its own source of chance: that of the process belongs to the shard's seed.
    spread = random.SystemRandom().uniform(0.5, 1.0)
    return min(_FIRST_PAUSE_S * 2.0 ** (tried - 1), _LONGEST_PAUSE_S) * spread
