"""The datasets that a worker built, and the rows of them that a plan asks for."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_flows.data import Batch, collate
from rlhf_flows.pools.messages import Source
from rlhf_flows.pools.shards import merge

__all__ = ["Datasets"]


class Datasets:
    """The datasets of one worker, by kind: `train`, `eval`."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._datasets: dict[str, Any] = {}

    def set(self, kind: str, digest: str, dataset: Any) -> None:
        self._digests[kind], self._datasets[kind] = digest, dataset

    def digests(self) -> tuple[tuple[str, str], ...]:
        """(kind, digest) of each."""
        return tuple(self._digests.items())

    def rows(self, source: Source) -> Batch:
        """Rows as the plan orders them; an item is fetched once for all its siblings."""
        dataset = self._datasets[source.dataset]
        rows = source.columns["prompt_row"]
        items = {row: dataset[row] for row in dict.fromkeys(rows)}
        samples = [items[row] for row in rows]
        collate_fn = getattr(dataset, "collate_fn", None)
        batch = collate(samples) if collate_fn is None else dict(collate_fn(samples))
        plan = {
            name: list(values) if name == "sample_id" else torch.tensor(values, dtype=torch.int64)
            for name, values in source.columns.items()
        }
        return merge([batch, plan])
