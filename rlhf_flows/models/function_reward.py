"""`FunctionReward`: a Python function scores completions.

Calls it (per sample or per batch, sync or async) and checks what it returns. The decision here: a
reward is checked where it is made. NaN, what is no number, or a list of the wrong length is the
user's mistake and ends the shard with the sample and the cause in one message, long before it could
become a gradient. Random numbers that the function draws are seeded from the sample's own seed, so
that a shard scored again has the same rewards.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch, batch_size
from rlhf_flows.errors import ConfigError, RewardError, WaitTimeoutError
from rlhf_flows.models.reward_function import RewardFunction, row_values
from rlhf_flows.modules.base import BaseModule

__all__ = ["FunctionReward"]


TEXTS = ("prompt", "completion")


class FunctionReward(BaseModule):
    """Adds `reward` [B] float32, and a column for every other number the function returns."""

    def __init__(
        self,
        name: str = "reward",
        *,
        function: str | Callable[..., Any],
        max_concurrency: int = 64,
        timeout_s: float = 60.0,
    ) -> None:
        """
        Args:
            function: `package.module:function`, or a callable. It gets, by keyword, the columns
                that its parameters name: `prompt`, `completion`, columns of the prompt file. It
                returns a number, or a dict of numbers with the key `reward`. With parameters
                named `prompts` or `completions`, or marked by `@batch_reward`, it gets lists and
                returns a list of either, or a dict of lists.
            max_concurrency: most calls of an async function in flight.
            timeout_s: longest an async call may take. A sync one is bounded by the shard's limit.
        """
        super().__init__(name)
        self.function = function
        self.max_concurrency = max_concurrency
        self.timeout_s = timeout_s
        self._found: RewardFunction | None = None

    def validate(self) -> None:
        """Imports the function and reads its signature."""
        if self.max_concurrency < 1 or not self.timeout_s > 0:
            raise ConfigError(
                f"module {self.name!r} has max_concurrency {self.max_concurrency} and timeout_s"
                f" {self.timeout_s}, expected at least 1 and more than 0"
            )
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
            WaitTimeoutError: an async call took longer than `timeout_s`.
        """
        function = self._found or RewardFunction.find(self.function)
        num_samples = batch_size(data)
        if num_samples == 0:
            return {"reward": torch.zeros(0)}
        columns = {name: row_values(column) for name, column in data.items()}
        picked = function.pick(columns)
        seeds = columns.get("seed") or [self.context.seed] * num_samples
        calls = _Calls(function=function, columns=columns, module=self.name)
        with _random_state_kept():
            if function.takes_batch:
                _seed(seeds[0])
                returned = calls.guarded(None, function.call, picked)
                if inspect.isawaitable(returned):
                    returned = _run(self._in_time(returned, None, calls))
                rows = _rows_of_batch(returned, num_samples, calls)
            elif function.is_async:
                _seed(seeds[0])
                rows = _run(self._all_samples(function, picked, num_samples, calls))
            else:
                rows = []
                for i in range(num_samples):
                    _seed(seeds[i])
                    rows.append(calls.guarded(i, function.call, _row(picked, i)))
        return _columns(rows, taken=data, calls=calls)

    async def _all_samples(
        self, function: RewardFunction, picked: dict[str, Any], num_samples: int, calls: _Calls
    ) -> list[Any]:
        gate = asyncio.Semaphore(self.max_concurrency)

        async def one(i: int) -> Any:
            async with gate:
                return await self._in_time(function.call(**_row(picked, i)), i, calls)

        return await asyncio.gather(*(one(i) for i in range(num_samples)))

    async def _in_time(self, call: Awaitable[Any], i: int | None, calls: _Calls) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                return await call
        except TimeoutError as e:
            if not limit.expired():
                raise calls.failed(i, e) from e
            raise WaitTimeoutError(
                f"reward {calls.function.label!r} of module {self.name!r} took longer than"
                f" {self.timeout_s} s for {calls.where(i)}: raise timeout_s, or look at what it"
                " waits for"
            ) from e
        except Exception as e:  # user code may raise anything
            raise calls.failed(i, e) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calls:
    """The calls on one shard: what their errors have to say."""

    function: RewardFunction
    module: str
    columns: Mapping[str, list[Any]]

    @property
    def label(self) -> str:
        return f"reward {self.function.label!r} of module {self.module!r}"

    def where(self, i: int | None) -> str:
        """The sample, with its prompt and completion; all of them for None."""
        if i is None:
            return f"a batch of {len(next(iter(self.columns.values())))} samples"
        name = self.columns["sample_id"][i] if "sample_id" in self.columns else f"row {i}"
        texts = [f"{c} {_short(self.columns[c][i])}" for c in TEXTS if c in self.columns]
        return f"sample {name}" + (f" ({', '.join(texts)})" if texts else "")

    def failed(self, i: int | None, cause: BaseException) -> RewardError:
        return RewardError(
            f"{self.label} raised {type(cause).__name__}: {cause}, for {self.where(i)}. Make it"
            " return a number for every completion a model may write"
        )

    def wrong(self, i: int | None, what: str) -> RewardError:
        return RewardError(f"{self.label} {what}, for {self.where(i)}")

    def guarded(self, i: int | None, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        try:
            return call(**arguments)
        except Exception as e:  # user code may raise anything
            raise self.failed(i, e) from e


def _short(text: Any) -> str:
    return text_of if len(text_of := repr(text)) <= 120 else f"{text_of[:117]}..."


def _row(picked: Mapping[str, list[Any]], i: int) -> dict[str, Any]:
    return {name: values[i] for name, values in picked.items()}


# ---- random numbers, event loops ------------------------------------------------------------


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


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # A loop runs in this thread already (a notebook, an async worker): take another thread.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


# ---- what came back -------------------------------------------------------------------------


def _rows_of_batch(returned: Any, num_samples: int, calls: _Calls) -> list[Any]:
    """A list of numbers or dicts, or a dict of lists of numbers, as one value per sample."""
    if isinstance(returned, Mapping):
        lists = {key: _rows_of_batch(v, num_samples, calls) for key, v in returned.items()}
        return [{key: values[i] for key, values in lists.items()} for i in range(num_samples)]
    if isinstance(returned, Tensor | np.ndarray):
        returned = returned.tolist()
    if isinstance(returned, str) or not isinstance(returned, Sequence):
        raise calls.wrong(
            None, f"returned {_short(returned)}, expected a list of {num_samples} numbers"
        )
    if len(returned) != num_samples:
        raise calls.wrong(
            None, f"returned {len(returned)} values, expected one for each of {num_samples} samples"
        )
    return list(returned)


def _columns(rows: Sequence[Any], *, taken: Mapping[str, Any], calls: _Calls) -> Batch:
    """[B] float32 columns of the numbers that each sample was given."""
    numbers = [_numbers(row, i, calls) for i, row in enumerate(rows)]
    names = list(numbers[0])
    for i, row in enumerate(numbers):
        if row.keys() != numbers[0].keys():
            odd = sorted(row.keys() ^ numbers[0].keys())
            raise calls.wrong(
                i,
                f"returned the keys {sorted(row)} and elsewhere {sorted(names)}: give {odd[0]!r}"
                " for every sample or for none",
            )
    clash = sorted(set(names) & set(taken))
    if clash:
        raise calls.wrong(
            None, f"returned a number named {clash[0]!r}, which is a column already: rename it"
        )
    return {
        name: torch.tensor([row[name] for row in numbers], dtype=torch.float32) for name in names
    }


def _numbers(row: Any, i: int, calls: _Calls) -> dict[str, float]:
    if not isinstance(row, Mapping):
        return {"reward": _number("reward", row, i, calls)}
    if "reward" not in row:
        raise calls.wrong(i, f"returned a dict of {sorted(map(str, row))}, without 'reward'")
    return {str(key): _number(str(key), value, i, calls) for key, value in row.items()}


def _number(key: str, value: Any, i: int, calls: _Calls) -> float:
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, Real):
        raise calls.wrong(i, f"returned {_short(value)} as {key!r}, expected a number")
    if not math.isfinite(value):
        raise calls.wrong(i, f"returned {value} as {key!r}, expected a finite number")
    return float(value)
