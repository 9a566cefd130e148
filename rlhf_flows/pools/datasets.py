"""The datasets that a worker built, and the rows of them that a plan asks for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from rlhf_flows.data import Batch, JoinedRows, Samples, batch_size, collate, open_here
from rlhf_flows.errors import DataError, RlhfFlowsError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.pools.messages import Source
from rlhf_flows.pools.shards import merge

__all__ = ["Datasets", "build"]


def build(
    module: BaseModule, rows: Sequence[Any], *, parts: Sequence[int] = (), is_eval: bool
) -> Any:
    """What the module makes of the rows: one dataset, or several joined.

    Args:
        parts: How many of the rows belong to each of several datasets.

    Raises:
        DataError: it made what is no dataset, or has no items; or this machine cannot read the
            file of the rows.
    """
    open_here(rows)
    if parts:
        method = "build_all_dataset"
        ends = list(accumulate(parts))
        all_rows = (
            list(rows.parts)
            if isinstance(rows, JoinedRows)
            else [list(rows[end - size : end]) for size, end in zip(parts, ends, strict=True)]
        )
        made = _made(module, method, all_rows, is_eval=is_eval)
        built = list(made) if isinstance(made, list | tuple) else [made]
        if len(built) != len(parts):
            raise DataError(
                f"{type(module).__name__}.build_all_dataset of module {module.name!r} returned"
                f" {len(built)} datasets for {len(parts)}: return a list, one for each"
            )
    else:
        method = "build_dataset"
        built = [_made(module, method, rows, is_eval=is_eval)]
    for dataset in built:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"{type(module).__name__}.{method} of module {module.name!r} returned a"
                f" {type(dataset).__name__}, expected a torch.utils.data.Dataset: an object with"
                " __len__ and __getitem__"
            )
        if not len(dataset):
            raise DataError(
                f"{type(module).__name__}.{method} of module {module.name!r} made a dataset"
                " without items of the rows it was given: return at least one"
            )
    return _Joined(built) if parts else built[0]


def _made(module: BaseModule, method: str, rows: Sequence[Any], *, is_eval: bool) -> Any:
    try:
        return getattr(module, method)(rows, is_eval=is_eval)
    except RlhfFlowsError:
        raise
    except Exception as e:
        raise DataError(
            f"{type(module).__name__}.{method} of module {module.name!r} failed on the rows that"
            f" set_dataset was given ({type(e).__name__}: {e}): look at what it expects of a row"
        ) from e


class _Joined:
    """Several datasets as one; the first one's `collate_fn` is asked for all."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self._datasets = datasets
        self._ends = list(accumulate(len(d) for d in datasets))
        self.collate_fn = getattr(datasets[0], "collate_fn", None)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(d) for d in self._datasets)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Any:
        number = bisect_right(self._ends, row)
        return self._datasets[number][row - (self._ends[number - 1] if number else 0)]


class Datasets:
    """The datasets of one worker, by kind: `train`, `eval`."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._datasets: dict[str, Any] = {}

    def set(self, kind: str, digest: str, dataset: Any) -> None:
        self._digests[kind], self._datasets[kind] = digest, dataset

    def known(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """(kind, digest, items of each part; of itself where it has none) of each."""
        return tuple((kind, digest, self.sizes(kind)) for kind, digest in self._digests.items())

    def sizes(self, kind: str) -> tuple[int, ...]:
        dataset = self._datasets[kind]
        return dataset.sizes if isinstance(dataset, _Joined) else (len(dataset),)

    def rows(self, source: Source) -> Batch:
        """Rows as the plan orders them; an item is fetched once for all its siblings."""
        dataset = self._datasets[source.dataset]
        rows = source.columns["prompt_row"]
        items = {row: _item(dataset, row) for row in dict.fromkeys(rows)}
        samples = [items[row] for row in rows]
        plan = {
            name: list(values) if name == "sample_id" else torch.tensor(values, dtype=torch.int64)
            for name, values in source.columns.items()
        }
        return merge([_collated(dataset, samples), plan])


def _item(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except RlhfFlowsError:
        raise
    except Exception as e:
        raise DataError(
            f"item {row} of {type(dataset).__name__} cannot be read ({type(e).__name__}: {e}):"
            " look at what its __getitem__ expects"
        ) from e


def _collated(dataset: Any, samples: list[Any]) -> Batch:
    collate_fn = getattr(dataset, "collate_fn", None)
    if collate_fn is None:
        for sample in samples:
            if not isinstance(sample, Mapping):
                raise DataError(
                    f"an item of {type(dataset).__name__} is a {type(sample).__name__}, expected a"
                    ' dict of columns, such as {"prompt": item}: return one from __getitem__, or'
                    " give the dataset a collate_fn"
                )
        return collate(samples)
    name = f"collate_fn of {type(dataset).__name__}"
    try:
        batch = collate_fn(Samples(samples))
    except RlhfFlowsError:
        raise
    except Exception as e:
        raise DataError(
            f"{name} failed ({type(e).__name__}: {e}): look at what it expects of an item"
        ) from e
    if not isinstance(batch, Mapping):
        raise DataError(
            f"{name} returned a {type(batch).__name__}, expected a dict of columns, each with a"
            " value for each sample"
        )
    if batch_size(batch) != len(samples):
        raise DataError(
            f"{name} returned {batch_size(batch)} rows for {len(samples)} samples: return one row"
            " for each, in their order"
        )
    return dict(batch)
