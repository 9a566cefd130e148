"""The optimizer steps of one episode, for the trained modules side by side: pure dispatch.

Membership and order of the batches come from the plan alone, so a step starts as soon as the shards
of its batch are scored, whatever came in before. Groups in quarantine leave their own batch smaller
and every other as it is; which they are is known of a shard once it is scored. Shards that turn out
to be damaged are put back (`repair`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_flows.data.plan import GroupRef, training_batches
from rlhf_flows.errors import InputLostError, NotBegunError, ShardDamageError
from rlhf_flows.graph import Node
from rlhf_flows.pools import NO_VERSION, Pool, Replica, Source, StoredShard, TrainCall, TrainRows
from rlhf_flows.tasks.relay import relay_batches, relay_samples, takes_relayed
from rlhf_flows.tasks.repair import repair
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.together import together

__all__ = ["tell_committed", "train_episode", "trained_nodes", "trainer_of"]

logger = logging.getLogger(__name__)


def trained_nodes(runtime: Runtime) -> tuple[Node, ...]:
    assert runtime.trainer is not None
    return runtime.trainer.nodes


async def train_episode(
    runtime: Runtime, data: EpisodeData, nodes: Sequence[Node], *, report: bool
) -> dict[str, float]:
    """All optimizer steps of one episode; the means of what the modules measured."""
    if takes_relayed(runtime, data.plan.episode):
        return await _train_relayed(runtime, data, nodes, report=report)
    settings = runtime.config.runtime
    batches = [
        batch
        for epoch in range(settings.num_training_epoch)
        for batch in training_batches(
            data.plan,
            samples_per_batch=settings.samples_per_batch,
            epoch=epoch,
            shuffle=settings.data_shuffle,
            whole_batches=settings.training_shuffle_mode == "batch",
        )
    ]
    given: dict[str, dict[int, frozenset[str]]] = {node.module: {} for node in nodes}
    measured: list[dict[str, float]] = []
    if report:
        runtime.progress.started("training", data.plan.episode, len(batches))
    for index in range(len(batches)):
        steps: dict[int, asyncio.Task[Mapping[str, float]]] = {}

        async def step(node: Node, index: int = index, steps: Any = steps) -> Mapping[str, float]:
            for other in node.after:
                await steps[other]
            held = given[node.module]
            return await _step(runtime, data, node, batches=batches, index=index, given=held)

        async with together() as group:
            for node in nodes:
                steps[node.id] = group.create_task(step(node))
        measured.append(_merge_metrics(nodes, [steps[node.id].result() for node in nodes]))
        if report:
            runtime.progress.advanced("training", data.plan.episode, index + 1)
    for node in nodes:
        _refuse_blame(data, node, given[node.module])
    _are_trained(runtime, nodes, data.plan.episode + 1)
    return _over_updates(measured)


async def _train_relayed(
    runtime: Runtime, data: EpisodeData, nodes: Sequence[Node], *, report: bool
) -> dict[str, float]:
    """The same on what the relay function returns."""
    count = await relay_samples(runtime, data, nodes)
    calls = relay_batches(runtime, data.plan.episode, count)
    measured: list[dict[str, float]] = []
    if report:
        runtime.progress.started("training", data.plan.episode, len(calls))
    for call in calls:
        async with together() as group:
            steps = [group.create_task(_relayed_step(runtime, node, call)) for node in nodes]
        measured.append(_merge_metrics(nodes, [step.result() for step in steps]))
        if report:
            runtime.progress.advanced("training", data.plan.episode, call.index + 1)
    _are_trained(runtime, nodes, data.plan.episode + 1)
    return _over_updates(measured)


async def _relayed_step(runtime: Runtime, node: Node, call: TrainCall) -> Mapping[str, float]:
    pool, replica = trainer_of(runtime, node)
    _leaves(replica)
    assert runtime.trainer is not None
    wants: Any = runtime.trainer.modules[node.module]
    whole = call.episode_rows if wants.wants_episode(call.num_updates) else None
    what = f"step {call.index + 1} of {call.num_updates} of training of episode {call.episode}"
    metrics: Mapping[str, float] = await pool.call(
        "train",
        replace(call, method=node.method, episode_rows=whole),
        what=f"{what} ({node.label})",
        timeout_s=runtime.config.runtime.train_timeout_s,
        as_held=True,
    )
    return metrics


async def _step(
    runtime: Runtime,
    data: EpisodeData,
    node: Node,
    *,
    batches: Sequence[Sequence[GroupRef]],
    index: int,
    given: dict[int, frozenset[str]],
) -> Mapping[str, float]:
    """One optimizer step of one module, once the shards that it needs are there.

    Args:
        given: Shards that the module has, and which of their samples were left out.
    """
    episode = data.plan.episode
    timeout_s = runtime.config.runtime.train_timeout_s
    module = runtime.trainer.modules[node.module] if runtime.trainer else None
    whole = bool(module and module.wants_episode(len(batches)))  # type: ignore[attr-defined]
    needed = {ref.shard for batch in (batches if whole else [batches[index]]) for ref in batch}
    new = sorted(needed - given.keys())
    if runtime.environment is not None:
        await data.scored.wait_for(new, timeout_s=timeout_s)
        if runtime.rollout_nodes and data.rollout is not data.scored:
            # A scored shard is there where its rollout shard was damaged and is being made again.
            await data.rollout.wait_for(new, timeout_s=timeout_s)
    what = f"step {index + 1} of {len(batches)} of training of episode {episode} ({node.label})"
    pool, replica = trainer_of(runtime, node)
    _leaves(replica)
    from_store = False
    while True:
        _refuse_blame(data, node, given)
        left_out = {shard: data.quarantine.left_out([shard]) for shard in new}
        call = TrainCall(
            attempt=runtime.attempt,
            episode=episode,
            version=episode,
            index=index,
            iteration=episode * len(batches) + index,
            num_updates=len(batches),
            method=node.method,
            rows=_rows(data, batches[index]),
            episode_rows=(
                tuple(_rows(data, batch) for batch in batches) if whole and index == 0 else None
            ),
            left_out=frozenset().union(*left_out.values()),
        )
        complete, tables = _shards(runtime, data, call, new, from_store=from_store)
        try:
            metrics: Mapping[str, float] = await pool.call(
                "train", complete, *tables, what=what, timeout_s=timeout_s, as_held=True
            )
        except ShardDamageError as damage:
            # The worker reads all shards before it does anything: the call can be made again. Who
            # is left out may be known anew by then.
            await repair(runtime, data, damage)
        except InputLostError as e:
            if from_store:
                raise
            logger.warning("%s: it is read from the store", e)
            from_store = True
        else:
            given.update(left_out)
            return metrics


def _refuse_blame(data: EpisodeData, node: Node, given: Mapping[int, frozenset[str]]) -> None:
    """Rows are counted without those left out: what a module was given cannot lose one later.

    Raises:
        NotBegunError: that happened, in the repair of a shard; the episode is trained again.
    """
    for shard, left_out in given.items():
        if data.quarantine.left_out([shard]) != left_out:
            raise NotBegunError(
                f"a sample of shard {shard} of episode {data.plan.episode} was quarantined after"
                f" {node.label} was given that shard: training of the episode starts again"
            )


def _shards(
    runtime: Runtime,
    data: EpisodeData,
    call: TrainCall,
    indices: Sequence[int],
    *,
    from_store: bool,
) -> tuple[TrainCall, list[Any]]:
    """The call with the shards that go with it, and their tables."""
    if runtime.environment is None:
        sources = [(i, Source(dataset="train", columns=data.plan.samples(i))) for i in indices]
        return replace(call, sources=tuple(sources)), []
    tables = [
        (i, _tables(data, i, from_store=from_store)) for i in indices if data.scored[i].rows != 0
    ]
    counts = tuple((i, len(some)) for i, some in tables)
    return replace(call, shards=counts), [table for _, some in tables for table in some]


def _tables(data: EpisodeData, index: int, *, from_store: bool) -> list[Any]:
    """A scored shard in its parts: what was sampled, if anything was, and what was scored."""
    parts = [data.scored[index]]
    if data.scored is not data.rollout and index not in data.rollout.missing:
        parts.insert(0, data.rollout[index])
    return [
        StoredShard(key=part.key) if from_store or part.ref is None else part.ref for part in parts
    ]


def _rows(data: EpisodeData, batch: Sequence[GroupRef]) -> tuple[TrainRows, ...]:
    """Sibling rows of each group, in the order of the batch, less the groups left out."""
    return tuple(TrainRows(shard=shard, rows=rows) for shard, rows in data.quarantine.rows(batch))


def trainer_of(runtime: Runtime, node: Node) -> tuple[Pool, Replica]:
    pool = runtime.pools[node.module]
    (replica,) = pool.replicas
    return pool, replica


def _leaves(replica: Replica) -> None:
    """It is about to train: at no version from here on."""
    replica.state = replace(replica.state, clean=False, trained=NO_VERSION)


def _are_trained(runtime: Runtime, nodes: Sequence[Node], version: int) -> None:
    for node in nodes:
        _, replica = trainer_of(runtime, node)
        replica.state = replace(replica.state, trained=version)


def tell_committed(runtime: Runtime, node: Node, version: int) -> None:
    """Tells the trainer. Its calls run in order, so that its next one knows; no answer is needed:
    one that died is found at its next call, and comes back from the commit. One that trains on
    already does not mind.
    """
    pool, replica = trainer_of(runtime, node)
    pool.tell(replica, "committed", version)
    if replica.state.trained == version:
        replica.state = replace(replica.state, version=version, clean=True, trained=NO_VERSION)


# ---- metrics ----------------------------------------------------------------------------------

_SUMMED = frozenset(
    {"pairs", "groups_tied", "rows", "rows_trained", "rows_filtered", "tokens", "seconds"}
)


def _merge_metrics(
    nodes: Sequence[Node], measured: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """One module's metrics under their names; of several, under `module/name`."""
    if len(nodes) == 1:
        return dict(measured[0])
    return {
        f"{node.module}/{name}": value
        for node, metrics in zip(nodes, measured, strict=True)
        for name, value in metrics.items()
    }


def _over_updates(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    merged = {}
    for name in names:
        values = [m[name] for m in measured if name in m]
        total = sum(values)
        merged[name] = total if name.rpartition("/")[2] in _SUMMED else total / len(values)
    return merged
