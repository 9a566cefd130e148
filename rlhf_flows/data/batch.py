"""A batch: named columns of one length. What modules receive and return.

The decision here: a batch is a plain `dict`, not a class. A column is a Tensor [B] or [B, ...], or
a list of B values (ragged 1-D tensors, str, None, Python scalars, dicts); one row is one sample.
User code needs nothing of ours to read or build one, and it crosses processes as it is. Knows
nothing of Arrow or Parquet (arrow.py) and of what a column means (columns.py).

Letters: B samples, T elements of a ragged row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_flows.errors import DataError

__all__ = ["Batch", "Samples", "batch_size", "collate", "concat", "select", "to_samples"]

Batch = dict[str, Any]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_OF_SCALARS = {torch.bool, torch.int64, torch.float64}
"""What bools, ints and floats of Python become."""


class Samples(list[dict[str, Any]]):
    """What a dataset's `collate_fn` is given: a list of samples, as a DataLoader gives it, that
    answers by column, too, as ChatLearn's documents have it (`for key, values in samples.items()`).
    """

    def keys(self) -> list[str]:
        """The columns of the first sample. Raises DataError where another has others."""
        names = list(self[0]) if self else []
        _check_keys(self, names)
        return names

    def values(self) -> list[list[Any]]:
        return [values for _, values in self.items()]

    def items(self) -> list[tuple[str, list[Any]]]:
        """Each column with its values, one for each sample."""
        return [(name, [sample[name] for sample in self]) for name in self.keys()]

    def __getitem__(self, which: Any) -> Any:
        """Sample `which`, or the values of the column of that name."""
        if isinstance(which, str):
            return [sample[which] for sample in self]
        return super().__getitem__(which)


def batch_size(batch: Mapping[str, Any]) -> int:
    """B, the length that all columns share; 0 for a batch without columns.

    Raises DataError naming the column whose length differs, or which is no column at all.
    """
    size: int | None = None
    first = ""
    for name, column in batch.items():
        length = _length(name, column)
        if size is None:
            size, first = length, name
        elif length != size:
            raise DataError(
                f"column {name!r} has {length} rows, but {first!r} has {size}: "
                "every column of a batch needs one value for each sample"
            )
    return size or 0


def select(batch: Mapping[str, Any], indices: Sequence[int] | Tensor) -> Batch:
    """The rows at `indices`, in that order; a row may be taken more than once."""
    size = batch_size(batch)
    if isinstance(indices, Tensor) and indices.dtype == torch.bool:
        raise DataError("rows were asked by a mask: give their indices, mask.nonzero()[:, 0]")
    rows = indices.tolist() if isinstance(indices, Tensor) else [int(i) for i in indices]
    for i in rows:
        if not -size <= i < size:
            raise DataError(f"row {i} was asked of a batch of {size} rows: rows count from 0")
    chosen: Batch = {}
    for name, column in batch.items():
        if isinstance(column, Tensor):
            chosen[name] = column[torch.tensor(rows, dtype=torch.int64, device=column.device)]
        else:
            chosen[name] = [column[i] for i in rows]
    return chosen


def concat(batches: Sequence[Mapping[str, Any]]) -> Batch:
    """The rows of all batches, one after another. All must have the same columns; a batch without
    any is left out.

    A dense [B, T] column joins a ragged one, or one of another T, as a ragged column: whether
    a shard's rows happen to be of equal length is chance, and must not decide what may be joined.
    """
    batches = [batch for batch in batches if batch]
    if not batches:
        return {}
    names = list(batches[0])
    for position, batch in enumerate(batches):
        batch_size(batch)
        odd = sorted(set(names) ^ set(batch))
        if odd:
            holder = "lacks" if odd[0] in names else "has, unlike the first,"
            raise DataError(
                f"batch {position} of {len(batches)} {holder} the column {odd[0]!r}: "
                "batches that are joined need the same columns"
            )
    return {name: _concat_column(name, [batch[name] for batch in batches]) for name in names}


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples to a batch: what a data loader does where a module brings no `collate_fn`.

    Tensors of one shape are stacked to [B, ...], 1-D tensors of several lengths stay a list;
    bool, int and float become tensors [B] (bool, int64, float64; ints among floats become
    float64); everything else (str, None, dicts, a mix, ints beyond 64 bits) stays a list. Arrays
    and scalars of numpy count as tensors and numbers.

    Raises DataError naming the key and the sample where samples do not agree.
    """
    if not samples:
        return {}
    names = list(samples[0])
    _check_keys(samples, names)
    return {name: _collate_column(name, [s[name] for s in samples]) for name in names}


def to_samples(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict for each row: columns [B] as Python scalars, [B, ...] as tensors [...]."""
    size = batch_size(batch)
    columns: dict[str, Sequence[Any]] = {}
    for name, column in batch.items():
        if not isinstance(column, Tensor):
            columns[name] = column
        elif column.ndim == 1:
            columns[name] = column.tolist()
        else:
            columns[name] = column.unbind(0)
    return [{name: column[i] for name, column in columns.items()} for i in range(size)]


def _check_keys(samples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for index, sample in enumerate(samples):
        odd = sorted(set(names) ^ set(sample))
        if odd:
            says = "lacks" if odd[0] in names else "has, unlike sample 0,"
            raise DataError(
                f"sample {index} of {len(samples)} {says} the key {odd[0]!r}: "
                "give every sample the same keys, with None where there is no value"
            )


def _length(name: str, column: Any) -> int:
    if isinstance(column, Tensor):
        if column.ndim == 0:
            raise DataError(
                f"column {name!r} is a tensor without dimensions: "
                "a column needs one value for each sample, shape [B] or [B, ...]"
            )
        return column.shape[0]
    if isinstance(column, list):
        return len(column)
    raise DataError(
        f"column {name!r} is a {type(column).__name__}: a column is a torch tensor or a list"
    )


def _concat_column(name: str, parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    # A list without rows says nothing (its dtype is lost); a tensor without rows does.
    said = [p for p in parts if isinstance(p, Tensor) or len(p) > 0]
    tensors = [p for p in said if isinstance(p, Tensor)]
    if not tensors:
        return [value for part in parts for value in part]
    values = [v for p in said if not isinstance(p, Tensor) for v in p]
    dtypes = {p.dtype for p in tensors} | {v.dtype for v in values if isinstance(v, Tensor)}
    if len(dtypes) == 1:
        if not values and len({p.shape[1:] for p in tensors}) == 1:
            return torch.cat(tensors)
        if all(p.ndim == 2 for p in tensors) and all(
            v is None or (isinstance(v, Tensor) and v.ndim == 1) for v in values
        ):
            return [v for p in said for v in (p.unbind(0) if isinstance(p, Tensor) else p)]
    if dtypes <= _OF_SCALARS and all(p.ndim == 1 for p in tensors):
        # Plain values: 1 in one batch, 0.5 or None in another. The same as collating them at once.
        return _collate_column(
            name, [v for p in said for v in (p.tolist() if isinstance(p, Tensor) else p)]
        )
    found = [f"{str(p.dtype)[6:]} {list(p.shape)}" for p in tensors]
    found += [f"a list with {type(values[0]).__name__}"] if values else []
    raise DataError(
        f"column {name!r} cannot be joined from {', '.join(dict.fromkeys(found))}: "
        "give it one dtype, and rows of one shape or 1-D rows"
    )


def _collate_column(name: str, values: list[Any]) -> Any:
    values = [_from_numpy(v) for v in values]
    if all(isinstance(v, Tensor) for v in values):
        return _collate_tensors(name, values)
    if all(type(v) is bool for v in values):
        return torch.tensor(values, dtype=torch.bool)
    kinds = {type(v) for v in values}
    if kinds == {int} and all(_INT64_MIN <= v <= _INT64_MAX for v in values):
        return torch.tensor(values, dtype=torch.int64)
    if float in kinds and kinds <= {int, float}:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)
    return values


def _collate_tensors(name: str, values: list[Tensor]) -> Any:
    first = values[0]
    for index, value in enumerate(values):
        if value.dtype != first.dtype:
            raise DataError(
                f"key {name!r} is {value.dtype} in sample {index} and {first.dtype} in sample 0: "
                "give it one dtype"
            )
    if all(v.shape == first.shape for v in values):
        return torch.stack(values)
    for index, value in enumerate(values):
        if value.ndim != 1:
            other = next(v for v in values if v.shape != value.shape)
            raise DataError(
                f"key {name!r} has shape {list(value.shape)} in sample {index} and "
                f"{list(other.shape)} elsewhere: only 1-D tensors may differ in length; "
                "pad them, or give the module a collate_fn"
            )
    return values


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic) and value.dtype.kind in "biufSU":
        return value.item()
    return value
