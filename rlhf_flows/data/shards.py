"""Which rows of the batches of a shard are worked on: some left out, all in one order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rlhf_flows.data.batch import Batch, select

__all__ = ["align", "keep_samples"]


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
