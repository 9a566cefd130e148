"""From plans and the batches of shards to the batches that models work on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch, concat, select
from rlhf_flows.data.plan import EpisodePlan, GroupRef
from rlhf_flows.errors import DataError

__all__ = ["align", "keep_samples", "planned_batch", "take_groups"]


def planned_batch(plan: EpisodePlan, shard: int) -> Batch:
    """The columns that the plan fixes, as a batch: sample_id str, the others int64 [B]."""
    return {
        name: values if name == "sample_id" else torch.tensor(values, dtype=torch.int64)
        for name, values in plan.samples(shard).items()
    }


def keep_samples(
    batch: Batch, samples: Collection[str] | None = None, *, but: Collection[str] = ()
) -> Batch:
    """The rows whose `sample_id` is among `samples` (all by default) and not among `but`."""
    if "sample_id" not in batch or (samples is None and not but):
        return batch
    ids = batch["sample_id"]
    rows = [i for i, n in enumerate(ids) if (samples is None or n in samples) and n not in but]
    return batch if len(rows) == len(ids) else select(batch, rows)


def align(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of one shard with equal rows: those that all have, in the order of the first.

    Rows are told apart by `sample_id`; a batch without that column is taken as it is. So what one
    phase left out is left out of what the phases before it made.
    """
    named = [batch["sample_id"] for batch in batches if "sample_id" in batch]
    if all(ids == named[0] for ids in named[1:]):
        return list(batches)
    common = set(named[0]).intersection(*named[1:])
    order = [name for name in named[0] if name in common]
    aligned = []
    for batch in batches:
        if "sample_id" in batch and batch["sample_id"] != order:
            row_of = {name: row for row, name in enumerate(batch["sample_id"])}
            batch = select(batch, [row_of[name] for name in order])
        aligned.append(batch)
    return aligned


def take_groups(
    plan: EpisodePlan, shards: Mapping[int, Mapping[str, Any]], groups: Sequence[GroupRef]
) -> Batch:
    """One training batch: the rows of `groups`, in their order, from the batches of their shards.

    Rows are found by the column `group`, so a group that was quarantined or filtered, and has no
    rows, is left out. Raises DataError for a shard that is not there.
    """
    rows_of: dict[int, dict[int, list[int]]] = {}
    parts = []
    for ref in groups:
        if ref.shard not in shards:
            has = ", ".join(str(i) for i in sorted(shards)) or "none"
            raise DataError(
                f"a training batch of episode {plan.episode} wants shard {ref.shard}, and was "
                f"given shards {has}: wait for it first"
            )
        if ref.shard not in rows_of:
            rows_of[ref.shard] = _rows_by_group(shards[ref.shard]["group"])
        rows = rows_of[ref.shard].get(plan.shards[ref.shard].first_group + ref.index)
        if rows:
            parts.append(select(shards[ref.shard], rows))
    return concat(parts)


def _rows_by_group(column: Tensor | list[int]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(column.tolist() if isinstance(column, Tensor) else column):
        rows.setdefault(group, []).append(row)
    return rows
