"""A global batch cut into micro-batches: by rows, or by a budget of tokens, as the run asks.

Letters: B samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.data.packing import cut_by_tokens
from rlhf_flows.errors import DataError

__all__ = ["cut_batch", "rows_of_rank"]

_TOKENS = ("prompt_ids", "response_ids", "input_ids")


def cut_batch(
    data: Batch, *, settings: Mapping[str, Any], rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's micro-batches, rows in order; the whole batch where nothing is asked for.

    `settings`: the runtime section; `train_micro_batch_size` rows, or `train_micro_batch_tokens`.
    Raises DataError where the batch has no tokens to count, or ranks would get unequal numbers.
    """
    size, tokens = settings.get("train_micro_batch_size"), settings.get("train_micro_batch_tokens")
    rows = range(batch_size(data))
    if size:
        parts: Sequence[Sequence[int]] = [rows[i : i + size] for i in range(0, len(rows), size)]
    elif tokens:
        parts = _in_multiples(cut_by_tokens(_costs(data), budget=tokens), world_size)
    else:
        return [data]
    return [select(data, part) for part in rows_of_rank(parts, rank=rank, world_size=world_size)]


def rows_of_rank(
    parts: Sequence[Sequence[int]], *, rank: int, world_size: int
) -> Sequence[Sequence[int]]:
    """Every `world_size`-th micro-batch: each rank the same number. Raises DataError otherwise."""
    if len(parts) % world_size:
        raise DataError(
            f"{len(parts)} micro-batches cannot be shared evenly by {world_size} ranks: choose"
            " runtime.train_global_batch_size as a multiple of runtime.train_micro_batch_size"
            " times the number of ranks"
        )
    return parts[rank::world_size]


def _in_multiples(bins: list[list[int]], multiple: int) -> list[list[int]]:
    """The bins, rows in order, some of them halved so that ranks can share them evenly."""
    while len(bins) % multiple:
        longest = max(bins, key=len)
        if len(longest) < 2:
            break  # fewer rows than ranks: said where they are shared out
        half = len(longest) // 2
        bins.append(longest[half:])
        del longest[half:]
    return [sorted(part) for part in bins]


def _costs(data: Batch) -> list[int]:
    """Tokens of each row."""
    columns = [data[name] for name in _TOKENS if name in data]
    if not columns:
        raise DataError(
            "runtime.train_micro_batch_tokens counts tokens, but the batch has none of"
            f" {', '.join(_TOKENS)}, only {sorted(data)}: use runtime.train_micro_batch_size"
        )
    return [sum(len(column[i]) for column in columns) for i in range(batch_size(data))]
