"""One episode of training in a worker: its shards, its batches, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_flows.data import Batch, batch_size, concat, select
from rlhf_flows.errors import DataError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.pools.messages import TrainCall, TrainRows
from rlhf_flows.pools.shards import metrics_of
from rlhf_flows.pools.user_code import call_hook, checked_batch, checked_metrics, naming

__all__ = ["EpisodeTraining"]


class EpisodeTraining:
    """What a trainer keeps while it trains on one episode."""

    def __init__(self, module: BaseModule, call: TrainCall) -> None:
        """
        Args:
            call: The first step of the episode.
        """
        self._module = module
        self._number, self._num_updates = call.episode, call.num_updates
        self._done = 0
        self._shards: dict[int, Batch] = {}
        self._prepared: dict[int, Batch] | None = None
        """By index of the optimizer step, where the module wants the episode."""
        with naming(module.name, "before_episode", "training", call.episode, 0, None):
            call_hook(module.before_episode, call.episode)

    def expects(self, call: TrainCall) -> bool:
        """Whether `call` is the step that comes next."""
        return (call.episode, call.index) == (self._number, self._done)

    @property
    def is_over(self) -> bool:
        return self._done == self._num_updates

    def step(self, call: TrainCall, shards: Mapping[int, Batch]) -> dict[str, float]:
        """One optimizer step; `shards` are those that came with the call. Returns its metrics."""
        self._shards |= shards
        where = (self._module.name, call.method, "training", call.episode, call.index)
        if call.episode_rows is not None:
            with naming(*where, None):
                self._prepare(call.episode_rows)
        batch: Batch = {}
        metrics: Mapping[str, float] = {}
        if call.rows:
            if self._prepared is not None:
                batch = self._prepared[call.index]
            else:
                with naming(*where, None):
                    batch = self._prepared_batch(call.rows)
            with naming(*where, batch):
                micro_batches = self._module.micro_batches(batch)
                step = getattr(self._module, call.method)
                metrics = checked_metrics(step(micro_batches, call.iteration))
        self._done += 1
        if self.is_over:
            with naming(
                self._module.name, "after_episode", "training", call.episode, call.index, None
            ):
                call_hook(self._module.after_episode, call.episode)
        seconds = {f"{name}_seconds": s for name, s in self._module.timers.take().items()}
        samples = {name: mean for name, (mean, _) in metrics_of(batch).items()}
        return {**samples, **seconds, **metrics, "rows": float(batch_size(batch))}

    def _prepare(self, batches: Sequence[tuple[TrainRows, ...]]) -> None:
        """Prepares the batches of the episode that have rows, and shows them to the module."""
        with_rows = [index for index, rows in enumerate(batches) if rows]
        prepared = [self._prepared_batch(batches[i]) for i in with_rows]
        shown = self._module.before_updates(prepared) if prepared else []
        if not isinstance(shown, list) or len(shown) != len(prepared):
            found = f"{len(shown)}" if isinstance(shown, list) else type(shown).__name__
            raise DataError(
                f"before_updates returned {found} for {len(prepared)} batches: return the list of"
                " them, in their order"
            )
        self._prepared = dict(zip(with_rows, shown, strict=True))

    def _prepared_batch(self, parts: Sequence[TrainRows]) -> Batch:
        batch = self._rows(parts)
        return checked_batch(self._module.prepare_batch(batch), batch)

    def _rows(self, parts: Sequence[TrainRows]) -> Batch:
        """The rows in the order of `parts`: one pass over each shard, however many parts it has."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        position = 0
        for part in parts:
            for row in part.rows:
                wanted.setdefault(part.shard, []).append((position, row))
                position += 1
        batch = concat([select(self._shards[i], [row for _, row in w]) for i, w in wanted.items()])
        if len(wanted) == 1:
            return batch
        came = [position for some in wanted.values() for position, _ in some]
        return select(batch, sorted(range(len(came)), key=came.__getitem__))
