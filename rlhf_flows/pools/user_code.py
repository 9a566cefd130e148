"""How the methods of a module are called: seeded, their output checked, their errors named."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from rlhf_flows.data import Batch, batch_size
from rlhf_flows.errors import DataError, NonFiniteError, RlhfFlowsError, ShardError, UserError
from rlhf_flows.pools.messages import ForwardCall

__all__ = [
    "call_hook",
    "checked_batch",
    "checked_metrics",
    "checked_output",
    "naming",
    "naming_columns",
    "seed_everything",
]


def seed_everything(*where: object) -> None:
    """Everything random that user code may use starts from `where`: run, module, rank, call."""
    text = "/".join(str(part) for part in where)
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    random.seed(seed)
    np.random.seed(seed)
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # the same for the CPU, without asking every other kind of device: 1 ms less a call
        torch.default_generator.manual_seed(seed)


class naming:
    """Names module, method, shard and samples in what user code raises."""

    def __init__(
        self, module: str, method: str, phase: str, episode: int, index: int, batch: Batch | None
    ) -> None:
        unit = f"step {index + 1}" if phase == "training" else f"shard {index}"
        self._where = f"{module}.{method} failed on {phase} of episode {episode}, {unit}"
        ids = [] if batch is None else list(batch.get("sample_id", []))
        self._batch = batch or {}
        self._samples = f" (samples {ids[0]} to {ids[-1]})" if ids else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError | NonFiniteError) and not isinstance(error, ShardError):
            raise type(error)(f"{self._where}{self._samples}: {error}") from error
        if isinstance(error, RlhfFlowsError) or not isinstance(error, Exception):
            return
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and self._batch and error.args[0] not in self._batch:
            cause += f" (the columns of the batch are {', '.join(map(repr, self._batch))})"
        raise ShardError(f"{self._where}{self._samples}: {cause}") from error


@contextlib.contextmanager
def naming_columns(call: ForwardCall, module: str) -> Iterator[None]:
    """Names the call whose columns cannot be kept."""
    try:
        yield
    except DataError as e:
        raise DataError(
            f"{module}.{call.method} failed on {call.phase} of episode {call.episode}, shard"
            f" {call.shard}: {e}"
        ) from e


def call_hook(method: Callable[..., None], number: int) -> None:
    """`before_episode` and the like, whose overrides may leave their argument out."""
    try:
        inspect.signature(method).bind(number)
    except TypeError:
        method()
    else:
        method(number)


def checked_metrics(metrics: Any) -> dict[str, float]:
    """A training step's metrics: numbers by name, or nothing.

    Raises DataError for anything else, NonFiniteError for a loss that is not finite.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise DataError(
            f"it returned a {type(metrics).__name__}, expected metrics, a dict of numbers, or None"
        )
    found: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as e:  # the last by a tensor of several
            raise DataError(
                f"its metric {name!r} is a {type(value).__name__}: metrics are numbers, such as"
                " float(loss)"
            ) from e
    for name in found:
        if "loss" in name and not math.isfinite(found[name]):
            raise NonFiniteError(
                f"its metric {name!r} is {found[name]}: what it did to the weights is not kept, and"
                " the run goes back to the version before when it is started again. Lower the"
                " learning rate, or look at the data of this batch"
            )
    return found


def checked_output(output: Any, data: Batch) -> Batch:
    """A method's output: a dict of columns with a row for each sample of `data`, or nothing."""
    if output is None:
        return {}
    if not isinstance(output, dict):
        raise DataError(
            f"it returned a {type(output).__name__}, expected a dict of columns (or None)"
        )
    rows = batch_size(data)
    if output and batch_size(output) != rows:
        raise DataError(
            f"it returned {batch_size(output)} rows for {rows}: return one row for each sample, in"
            " the same order"
        )
    given, returned = data.get("sample_id"), output.get("sample_id")
    if given is not None and returned is not None and list(returned) != list(given):
        row = next(i for i, (a, b) in enumerate(zip(given, returned, strict=True)) if a != b)
        raise DataError(
            f"it returned sample {returned[row]!r} as row {row}, where it was given {given[row]!r}:"
            " rows are matched by their place, so return them in the order they came in"
        )
    return output


def checked_batch(batch: Any, data: Batch) -> Batch:
    """What `prepare_batch` made of `data`: columns may be new, the rows are the same."""
    if not isinstance(batch, dict) or batch_size(batch) != batch_size(data):
        found = f"{batch_size(batch)} rows" if isinstance(batch, dict) else type(batch).__name__
        raise DataError(
            f"prepare_batch returned {found} for {batch_size(data)} rows: return the batch with the"
            " same rows, in their order; leave samples out of the loss in train_step"
        )
    return batch
