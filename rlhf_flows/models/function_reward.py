"""`FunctionReward`: a Python function scores completions.

Calls it (per sample or per batch, sync or async) and checks what it returns. The decision here: a
reward is checked where it is made (reward_results.py). NaN, what is no number, or a list of the
wrong length is known with the sample and the cause in one message, long before it could become a
gradient. Random numbers that the function draws are seeded from the sample's own seed, so that a
shard scored again has the same rewards.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.call_limit import OutOfTimeError, call_within
from rlhf_flows.models.event_loop import run_to_end
from rlhf_flows.models.reward_function import RewardFunction
from rlhf_flows.models.reward_results import Failed, Scoring
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import OnFailure

__all__ = ["FunctionReward"]

DEFAULT_TIMEOUT_S = 60.0


class FunctionReward(BaseModule):
    """Adds `reward` [B] float32, and a column for every other number the function returns."""

    def __init__(
        self,
        name: str = "reward",
        *,
        function: str | Callable[..., Any],
        max_concurrency: int = 64,
        timeout_s: float | None = None,
        on_failure: OnFailure = "stop",
        failure_reward: float = 0.0,
    ) -> None:
        """
        Args:
            function: `package.module:function`, or a callable. It gets, by keyword, the columns
                that its parameters name: `prompt`, `completion`, columns of the prompt file. It
                returns a number, or a dict of numbers with the key `reward`. With parameters
                named `prompts` or `completions`, or marked by `@batch_reward`, it gets lists and
                returns a list of either, or a dict of lists.
            max_concurrency: most calls of an async function in flight.
            timeout_s: longest that a call may take; 60 by default. A sync function is stopped (see
                call_limit.py for what cannot be) where this is given, or on_failure is "score";
                else it is bounded by the shard's limit alone.
            on_failure: "stop": a sample for which the function raises, takes too long or returns
                no finite number ends the run. "score": it gets `failure_reward`, and its cause
                stands in the column `reward_failure`. A function of a batch that raises fails for
                all of it, which ends the run either way.
        """
        super().__init__(name)
        self.function = function
        self.max_concurrency = max_concurrency
        self.timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        self.sync_timeout_s = timeout_s if on_failure == "stop" else self.timeout_s
        self.on_failure: OnFailure = on_failure
        self.failure_reward = failure_reward
        self._found: RewardFunction | None = None

    def validate(self) -> None:
        """Imports the function and reads its signature."""
        if self.max_concurrency < 1 or not self.timeout_s > 0:
            raise ConfigError(
                f"module {self.name!r} has max_concurrency {self.max_concurrency} and timeout_s"
                f" {self.timeout_s}, expected at least 1 and more than 0"
            )
        Scoring.check(self.name, on_failure=self.on_failure, failure_reward=self.failure_reward)
        RewardFunction.find(self.function)

    def fingerprint(self) -> bytes:
        """With the source of the function's module: a function that is mended is another one."""
        call = RewardFunction.find(self.function).call
        file = getattr(sys.modules.get(getattr(call, "__module__", "")), "__file__", None)
        code = Path(file).read_bytes() if file and Path(file).is_file() else b""
        return super().fingerprint() + code

    def setup(self) -> None:
        self._found = RewardFunction.find(self.function)

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Only the new columns, row by row.

        Raises:
            RewardError: the function raises, or returns what is no reward.
            WaitTimeoutError: a call took longer than `timeout_s`.
        """
        function = self._found or RewardFunction.find(self.function)
        scoring = Scoring(
            data,
            label=f"reward {function.label!r} of module {self.name!r}",
            on_failure=self.on_failure,
            failure_reward=self.failure_reward,
        )
        if not scoring.num_samples:
            return scoring.columns_of([])
        picked = function.pick(scoring.columns)
        with _random_state_kept():
            return scoring.columns_of(self._rows(function, picked, scoring))

    def _rows(
        self, function: RewardFunction, picked: dict[str, list[Any]], scoring: Scoring
    ) -> list[Any]:
        seeds = scoring.columns.get("seed") or [self.context.seed] * scoring.num_samples
        if not (function.takes_batch or function.is_async):
            rows = []
            for i, seed in enumerate(seeds):
                _seed(seed)
                rows.append(self._guarded(function, _row(picked, i), i, scoring))
            return rows
        _seed(seeds[0])
        if function.takes_batch:
            returned = self._guarded(function, picked, None, scoring)
            if inspect.isawaitable(returned):
                returned = run_to_end(self._in_time(returned, None, scoring))
            if isinstance(returned, Failed):
                return [returned] * scoring.num_samples
            return scoring.one_for_each(returned)
        return run_to_end(self._all_samples(function, picked, scoring))

    def _guarded(
        self, function: RewardFunction, arguments: dict[str, Any], i: int | None, scoring: Scoring
    ) -> Any:
        try:
            return call_within(self.sync_timeout_s, lambda: function.call(**arguments))
        except OutOfTimeError as e:
            return self._too_long(i, e, scoring)
        except Exception as e:  # user code may raise anything
            return _raised(i, e, scoring)

    async def _all_samples(
        self, function: RewardFunction, picked: dict[str, list[Any]], scoring: Scoring
    ) -> list[Any]:
        gate = asyncio.Semaphore(self.max_concurrency)

        async def one(i: int) -> Any:
            async with gate:
                return await self._in_time(function.call(**_row(picked, i)), i, scoring)

        return await asyncio.gather(*(one(i) for i in range(scoring.num_samples)))

    async def _in_time(self, call: Awaitable[Any], i: int | None, scoring: Scoring) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                return await call
        except TimeoutError as e:
            return self._too_long(i, e, scoring) if limit.expired() else _raised(i, e, scoring)
        except Exception as e:  # user code may raise anything
            return _raised(i, e, scoring)

    def _too_long(self, i: int | None, cause: Exception, scoring: Scoring) -> Failed:
        return scoring.fail(
            i,
            f"took longer than {self.timeout_s:g} s",
            hint="Raise timeout_s, or look at what it waits for",
            cause=cause,
            may_pass=True,
        )


def _raised(i: int | None, cause: Exception, scoring: Scoring) -> Failed:
    return scoring.fail(
        i,
        f"raised {type(cause).__name__}: {cause}",
        hint="Make it return a number for every completion a model may write",
        cause=cause,
    )


def _row(picked: Mapping[str, list[Any]], i: int) -> dict[str, Any]:
    return {name: values[i] for name, values in picked.items()}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
