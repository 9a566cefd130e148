"""One phase's part of the graph on one shard: node after node, the last one commits.

Nodes exchange references; only reports come here. A shard whose replica died starts again from its
first node, on whoever is free, with inputs from the store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.errors import ReplicaDiedError, WaitTimeoutError
from rlhf_flows.graph import BATCH, Graph, Node
from rlhf_flows.pools import Commit, ForwardCall, NodeReport, Source, StoredShard
from rlhf_flows.pools.messages import SOURCE
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["PhaseGraph", "ShardJob", "mean_metrics", "run_shard", "together"]

_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseGraph:
    """The nodes of one phase, in order, and which of their outputs are stored."""

    name: str
    graph: Graph
    nodes: tuple[Node, ...]
    stored: frozenset[int]

    @classmethod
    def of(cls, name: str, graph: Graph, ids: frozenset[int]) -> PhaseGraph:
        """Stored is what the flow returns, what other phases take, and what nobody takes."""
        nodes = tuple(n for n in graph.nodes if n.id in ids)
        taken_inside = {i for n in nodes for i in n.inputs}
        taken_outside = {i for n in graph.nodes if n.id not in ids for i in n.inputs}
        stored = {
            n.id
            for n in nodes
            if n.id in graph.outputs or n.id in taken_outside or n.id not in taken_inside
        }
        return cls(name=name, graph=graph, nodes=nodes, stored=frozenset(stored))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to be made."""

    index: int
    episode: int
    key: str
    versions: Mapping[str, int]
    source: Source | None = None
    """Where the shard starts from rows of the dataset."""
    base: ShardHandle | None = None
    """Where it starts from a rollout shard."""


async def run_shard(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob
) -> tuple[ShardHandle, NodeReport]:
    """Makes one shard and returns its handle and the report of its last node.

    Raises:
        ReplicaDiedError, WaitTimeoutError: it failed on every try.
        UserError: the module's code or its data is wrong; not tried again.
    """
    for left in reversed(range(_TRIES)):
        try:
            return await _run_nodes(runtime, phase, job, from_store=left < _TRIES - 1)
        except (ReplicaDiedError, WaitTimeoutError):
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


async def _run_nodes(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob, *, from_store: bool
) -> tuple[ShardHandle, NodeReport]:
    outputs: dict[int, Any] = {}
    if job.base is not None:
        usable = job.base.ref is not None and not from_store
        outputs[BATCH] = job.base.ref if usable else StoredShard(key=job.base.key)
    inside = {n.id for n in phase.nodes}
    last = phase.nodes[-1]
    for node in phase.nodes:
        is_last = node is last
        tables = _Tables()
        inputs: list[int] = []
        takes_source = False
        for i in node.inputs:
            # Whatever comes from the rollout phase is in the rollout shard.
            origin = i if i in inside else BATCH
            if origin == BATCH and BATCH not in outputs:
                takes_source = True
                inputs.append(SOURCE)
            else:
                inputs.append(tables.add(outputs[origin]))
        merged = [i for i in sorted(phase.stored) if is_last and i != last.id]
        if is_last and job.base is None and BATCH in outputs:
            merged.insert(0, BATCH)  # the rows that the first node was given
        call = ForwardCall(
            attempt=runtime.attempt,
            phase=phase.name,
            episode=job.episode,
            shard=job.index,
            method=node.method,
            options=node.options,
            inputs=tuple(dict.fromkeys(inputs)),
            source=job.source if takes_source else None,
            keep_source=takes_source and not is_last,
            merged=tuple(tables.add(outputs[i]) for i in merged),
            base=tables.add(outputs[BATCH]) if is_last and job.base is not None else None,
            version=job.versions.get(node.module),
            batch_size=runtime.config.for_model(node.module).generation_batch_size,
            commit=Commit(key=job.key) if is_last else None,
        )
        table, source, report = await runtime.pools[node.module].call(
            "forward",
            call,
            *tables.refs,
            what=f"shard {job.index} of {phase.name} of episode {job.episode} ({node.label})",
            timeout_s=runtime.config.runtime.shard_timeout_s,
            version=job.versions.get(node.module),
            num_returns=3,
        )
        outputs[node.id] = table
        if takes_source and not is_last:
            outputs[BATCH] = source
    handle = ShardHandle(index=job.index, key=report.key, rows=report.rows, ref=outputs[last.id])
    return handle, report


class _Tables:
    """The tables that go with a call, each once."""

    def __init__(self) -> None:
        self.refs: list[Any] = []

    def add(self, table: Any) -> int:
        for index, known in enumerate(self.refs):
            if known is table:
                return index
        self.refs.append(table)
        return len(self.refs) - 1


def mean_metrics(reports: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over all rows, of the means over the rows of each shard."""
    sums: dict[str, tuple[float, int]] = {}
    for metrics in reports:
        for name, (mean, rows) in metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * rows, count + rows)
    return {name: total / count for name, (total, count) in sums.items() if count}


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises its first failure itself, not a group of one."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise _first_leaf(failures) from failures


def _first_leaf(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
