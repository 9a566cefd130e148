"""What a reward returned for each sample: checked, kept as columns, or kept as a failure.

Every source of rewards (a function, a classifier, a program, a service) hands what it got to one
`Scoring` of its batch. The decision here: a sample either has finite numbers or has `Failed`, and
one place says what that means. With on_failure="stop" the first failure is raised, with sample,
prompt, completion and cause; with "score" the sample gets `failure_reward`, its cause stands in the
column `reward_failure`, and the run goes on. A reward that fails for all of several samples is an
outage, and stops the run in either case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch, batch_size
from rlhf_flows.errors import ConfigError, RewardError, WaitTimeoutError
from rlhf_flows.reward_settings import OnFailure

__all__ = ["FAILURE_COLUMNS", "Failed", "Scoring", "json_rows", "row_values", "short"]

FAILURE_COLUMNS = ("reward_failure", "reward_failed")
"""Added with on_failure="score": the cause as text or None, and whether there is one, as a bool."""

_TEXTS = ("prompt", "completion")
_LONGEST_CAUSE = 500


@dataclass(frozen=True, slots=True)
class Failed:
    """In place of a sample's numbers: what happened, as it stands in `reward_failure`."""

    what: str


class Scoring:
    """One batch that is being scored."""

    def __init__(
        self, data: Batch, *, label: str, on_failure: OnFailure, failure_reward: float
    ) -> None:
        """`label` names the reward in messages, such as "reward 'm:f' of module 'reward'"."""
        self.data = data
        self.label = label
        self.on_failure = on_failure
        self.failure_reward = failure_reward
        self.num_samples = batch_size(data)
        self.columns = {name: row_values(column) for name, column in data.items()}
        self._first: RewardError | WaitTimeoutError | None = None

    @staticmethod
    def check(name: str, *, on_failure: str, failure_reward: float) -> None:
        """Raises ConfigError for settings of module `name` that no batch could be scored with."""
        if on_failure not in ("stop", "score") or not math.isfinite(failure_reward):
            raise ConfigError(
                f"module {name!r} has on_failure {on_failure!r} and failure_reward"
                f" {failure_reward}, expected 'stop' or 'score', and a finite number"
            )

    def where(self, i: int | None) -> str:
        """The sample, with its prompt and completion; all of them for None."""
        if i is None:
            return f"a batch of {self.num_samples} samples"
        name = self.columns["sample_id"][i] if "sample_id" in self.columns else f"row {i}"
        texts = [f"{c} {short(self.columns[c][i])}" for c in _TEXTS if c in self.columns]
        return f"sample {name}" + (f" ({', '.join(texts)})" if texts else "")

    # ---- failures ---------------------------------------------------------------------------

    def fail(
        self,
        i: int | None,
        what: str,
        *,
        hint: str = "",
        cause: BaseException | None = None,
        may_pass: bool = False,
    ) -> Failed:
        """What stands for sample `i`, or for all of them where `i` is None.

        `what` goes on from the label, as in "returned nan"; `hint` says what to do about it.
        Raises, with on_failure="stop": WaitTimeoutError where it `may_pass`, or RewardError.
        """
        kind = WaitTimeoutError if may_pass else RewardError
        error = kind(f"{self.label} {what}, for {self.where(i)}" + (hint and f". {hint}"))
        if self.on_failure == "stop":
            raise error from cause
        if self._first is None:
            error.__cause__ = cause
            self._first = error
        return Failed(what if len(what) <= _LONGEST_CAUSE else f"{what[: _LONGEST_CAUSE - 3]}...")

    def wrong(self, i: int | None, what: str) -> RewardError:
        """A mistake in the reward that no single sample is to blame for: raise it in any case."""
        return RewardError(f"{self.label} {what}, for {self.where(i)}")

    # ---- numbers ----------------------------------------------------------------------------

    def one_for_each(self, returned: Any, indices: Sequence[int] | None = None) -> list[Any]:
        """A list of values, or a dict of lists, as one value for each of `indices` (all, if None).

        Raises RewardError for anything else, or another number of values.
        """
        count = self.num_samples if indices is None else len(indices)
        if isinstance(returned, Mapping):
            lists = {key: self.one_for_each(v, indices) for key, v in returned.items()}
            return [{key: values[i] for key, values in lists.items()} for i in range(count)]
        if isinstance(returned, Tensor | np.ndarray):
            returned = returned.tolist()
        if isinstance(returned, str) or not isinstance(returned, Sequence):
            raise self.wrong(
                None, f"returned {short(returned)}, expected a list of {count} numbers"
            )
        if len(returned) != count:
            raise self.wrong(
                None, f"returned {len(returned)} values, expected one for each of {count} samples"
            )
        return list(returned)

    def columns_of(self, rows: Sequence[Any]) -> Batch:
        """[B] float32 columns of `rows`: a number, a dict of numbers with `reward`, or Failed.

        With on_failure="score" `FAILURE_COLUMNS` stand beside them; what else a reward returns is 0
        for samples that failed. Raises RewardError for what is no reward, where it must.
        """
        assert len(rows) == self.num_samples
        numbers = [self._numbers(i, row) for i, row in enumerate(rows)]
        scored = [row for row in numbers if isinstance(row, dict)]
        names = list(scored[0]) if scored else ["reward"]
        for i, row in enumerate(numbers):
            if isinstance(row, dict) and row.keys() != set(names):
                odd = sorted(row.keys() ^ set(names))
                raise self.wrong(
                    i,
                    f"returned the keys {sorted(row)} and elsewhere {sorted(names)}: give"
                    f" {odd[0]!r} for every sample or for none",
                )
        self._refuse_clash(names)
        if not scored and self.num_samples > 1:
            assert self._first is not None
            raise RewardError(  # also where a single one may pass: each try would take as long
                f"all {self.num_samples} samples of a batch failed, which is an outage and no"
                f" score, whatever on_failure says; the first: {self._first}"
            ) from self._first
        failed = {"reward": self.failure_reward}
        columns: Batch = {
            name: torch.tensor(
                [failed.get(name, 0.0) if isinstance(r, Failed) else r[name] for r in numbers],
                dtype=torch.float32,
            )
            for name in names
        }
        if self.on_failure == "score":
            causes = [row.what if isinstance(row, Failed) else None for row in numbers]
            columns["reward_failure"] = causes
            columns["reward_failed"] = torch.tensor(
                [c is not None for c in causes], dtype=torch.bool
            )
        return columns

    def _refuse_clash(self, names: Sequence[str]) -> None:
        taken = {*self.data, *FAILURE_COLUMNS}
        clash = sorted(set(names) & taken)
        if clash:
            raise self.wrong(
                None, f"returned a number named {clash[0]!r}, which is a column already: rename it"
            )

    def _numbers(self, i: int, row: Any) -> dict[str, float] | Failed:
        if isinstance(row, Failed):
            return row
        if not isinstance(row, Mapping):
            row = {"reward": row}
        if "reward" not in row:
            return self.fail(i, f"returned a dict of {sorted(map(str, row))}, without 'reward'")
        numbers: dict[str, float] = {}
        for key, value in row.items():
            if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
                value = value.item()
            if not isinstance(value, Real):
                return self.fail(i, f"returned {short(value)} as {str(key)!r}, expected a number")
            number = _float32(value)
            if not math.isfinite(number):
                return self.fail(i, f"returned {value} as {str(key)!r}, expected a finite number")
            numbers[str(key)] = number
        return numbers


def _float32(value: Real) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        return math.inf
    # The column is float32: what is finite only as float64 would become infinity there.
    return number if abs(number) <= torch.finfo(torch.float32).max else math.inf


def short(value: Any) -> str:
    """Its repr, at most 120 characters of it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def row_values(column: Any) -> list[Any]:
    """The values of a column, one per sample: numbers of a [B] tensor as Python numbers."""
    if isinstance(column, Tensor):
        return column.tolist() if column.ndim == 1 else list(column)
    return list(column)


def json_rows(columns: Mapping[str, list[Any]], indices: Iterable[int]) -> list[dict[str, Any]]:
    """The rows as JSON has them, for programs and services: texts, numbers, lists, dicts.

    Tensors (tokens, log-probabilities) and bytes are left out; NaN and infinity become null.
    """
    kept = {
        name: values
        for name, values in columns.items()
        if not any(isinstance(v, Tensor | bytes) for v in values)
    }
    return [{name: _plain(values[i]) for name, values in kept.items()} for i in indices]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
