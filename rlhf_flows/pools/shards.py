"""Shards as a worker sees them: read from a Ray object or the store, merged, written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.data import (
    Batch,
    align,
    batch_size,
    from_arrow,
    from_parquet,
    to_arrow,
    to_parquet,
)
from rlhf_flows.errors import DataDamageError, ShardDamageError
from rlhf_flows.pools.messages import ForwardCall, NodeReport, StoredShard
from rlhf_flows.store import ObjectStore, commit_bytes

__all__ = ["ShardStore", "merge", "metrics_of", "previews_of"]

_PREVIEWS = 3
_PREVIEW_CHARACTERS = 400
_PREVIEW_COLUMNS = ("sample_id", "prompt", "completion", "reward", "finish_reason")
_NO_METRIC = frozenset({"group", "sibling", "prompt_row", "seed", "policy_version", "prompt_ids"})


class ShardStore:
    """Reads and commits the shards of one run."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def load(self, table: Any) -> Batch:
        """A batch from an Arrow table, or from the object that a `StoredShard` names.

        Raises ShardDamageError, which names the object, where its bytes are not those written.
        """
        if not isinstance(table, StoredShard):
            return from_arrow(table)
        try:
            return from_parquet(self._store.get(table.key))
        except DataDamageError as e:
            raise ShardDamageError(
                f"the shard {self._store.url}/{table.key} is damaged: {e}", key=table.key
            ) from e

    def commit(
        self,
        call: ForwardCall,
        report: NodeReport,
        *,
        source: Batch | None,
        base: Batch | None,
        merged: Sequence[Batch],
        output: Batch,
    ) -> tuple[Any, Batch, NodeReport]:
        """Writes the shard, or adopts the one that is there.

        Stored is what the phase's nodes gave, less what the rollout shard holds already. Returned
        is what is stored, encoded once for the file and for who reads it from memory; the batch of
        both; and where it lies.
        """
        assert call.commit_key is not None
        whole = merge([b for b in (base, source, *merged, output) if b is not None])
        stored = whole if base is None else _new_columns(whole, base)
        if "sample_id" in whole:
            stored = {"sample_id": whole["sample_id"], **stored}
        table = to_arrow(stored)
        data = to_parquet(table)
        adopted = not commit_bytes(self._store, call.commit_key, data)
        if adopted:
            theirs = self.load(StoredShard(key=call.commit_key))
            table = to_arrow(theirs)
            whole = merge(align([b for b in (base, theirs) if b is not None]))
        report = replace(report, key=call.commit_key, adopted=adopted)
        return table, whole, report


def merge(batches: Sequence[Mapping[str, Any]]) -> Batch:
    """One batch with the columns of all; later ones win."""
    merged: Batch = {}
    for batch in batches:
        merged.update(batch)
    return merged


def _new_columns(whole: Batch, base: Batch) -> Batch:
    return {k: v for k, v in whole.items() if k not in base or not _same(v, base[k])}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _same_values(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        return bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    return torch.equal(a, b)


def metrics_of(batch: Batch) -> dict[str, tuple[float, int]]:
    """(mean, rows) of each number column, and of the lengths of ragged ones."""
    rows = batch_size(batch)
    metrics: dict[str, tuple[float, int]] = {}
    for name, column in batch.items():
        if name in _NO_METRIC or not rows:
            continue
        if isinstance(column, Tensor) and column.ndim == 1 and column.dtype.itemsize <= 8:
            metrics[name] = (float(column.double().mean()), rows)
        elif name == "response_ids":
            metrics["response_length"] = (sum(len(r) for r in column) / rows, rows)
        elif name == "finish_reason":
            metrics["truncated"] = (sum(r == "length" for r in column) / rows, rows)
    return metrics


def previews_of(batch: Batch) -> tuple[dict[str, Any], ...]:
    """A few samples of a scored shard, shortened for a table."""
    if "completion" not in batch or "reward" not in batch:
        return ()
    rows = batch_size(batch)
    previews = []
    # Rows far apart: those next to each other are siblings.
    for row in sorted({i * rows // _PREVIEWS for i in range(_PREVIEWS)} if rows else ()):
        preview: dict[str, Any] = {}
        for name in _PREVIEW_COLUMNS:
            if name in batch:
                value = batch[name][row]
                preview[name] = value.item() if isinstance(value, Tensor) else value
                if isinstance(preview[name], str):
                    preview[name] = preview[name][:_PREVIEW_CHARACTERS]
        previews.append(preview)
    return tuple(previews)
