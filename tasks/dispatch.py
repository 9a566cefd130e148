"""One phase's part of the graph on one shard: node after node, the last one commits.

Nodes exchange references; only reports come here. A shard whose replica died starts again from its
first node, on whoever is free, with inputs from the store. One that fails twice is searched for the
sample that does it, on parts that are never committed; without its culprits, and their groups, the
shard is then made in one call like any other, so that its bits depend on nothing but which samples
are left out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.errors import NoAnswerError, ReplicaDiedError, UserError, WaitTimeoutError
from rlhf_flows.graph import BATCH, Graph, Node
from rlhf_flows.pools import ForwardCall, NodeReport, Source, StoredShard
from rlhf_flows.pools.messages import SOURCE
from rlhf_flows.tasks.bisection import Failure, find_culprits
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["Blame", "PhaseGraph", "ShardJob", "mean_metrics", "run_shard", "volume"]

logger = logging.getLogger(__name__)

_TRIES = 4
"""Of a call that could not begin."""

Blame = Callable[[Mapping[str, Failure]], Awaitable[Collection[str]]]
"""Writes down who is to blame; returns the ids of all samples that are left out for it."""


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
    """Where it is committed; empty for a part whose results are thrown away."""
    versions: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]
    """Ids of the samples that it is to hold, by group."""
    source: Source | None = None
    """Where the shard starts from rows of the dataset."""
    base: ShardHandle | None = None
    """Where it starts from a rollout shard."""
    is_cut: bool = False
    """The base may hold samples that are in none of `groups`."""

    @property
    def samples(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)

    def keeping(self, samples: Collection[str]) -> Self:
        """The same shard with those of its samples that are among `samples`."""
        keep = frozenset(samples)
        if keep.issuperset(self.samples):
            return self
        groups = (tuple(name for name in group if name in keep) for group in self.groups)
        source = None if self.source is None else _select_rows(self.source, keep)
        return replace(self, groups=tuple(g for g in groups if g), source=source, is_cut=True)

    def part(self, samples: Collection[str]) -> Self:
        """Some samples of the shard, made to be thrown away."""
        return replace(self.keeping(samples), key="")


def _select_rows(source: Source, samples: frozenset[str]) -> Source:
    rows = [i for i, name in enumerate(source.columns["sample_id"]) if name in samples]
    columns = {name: [values[i] for i in rows] for name, values in source.columns.items()}
    return replace(source, columns=columns)


class _Failed(Exception):
    """A shard, or a part of one, ended or hung the worker of a node. Goes no further than here."""

    def __init__(self, node: Node, error: ReplicaDiedError | NoAnswerError) -> None:
        super().__init__(str(error))
        self.node = node
        self.error = error

    @property
    def failure(self) -> Failure:
        return Failure(module=self.node.module, cause=str(self.error))


async def run_shard(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob, *, blame: Blame
) -> tuple[ShardHandle, NodeReport]:
    """Makes one shard and returns its handle and the report of its last node.

    A shard of which nothing is left has no object: its handle has no key and no rows.

    Raises:
        ReplicaDiedError, NoAnswerError: it fails as a whole, and no sample of it does so alone.
        NotBegunError, WaitTimeoutError: it could not begin, or its module waited in vain.
        UserError: the module's code or its data is wrong; not tried again.
    """
    searched_in_vain = False
    while job.groups:
        try:
            return await _run_twice(runtime, phase, job)
        except _Failed as failed:
            if searched_in_vain:
                raise type(failed.error)(
                    f"{failed.error}. It fails whenever it is run as a whole, and none of its"
                    " samples fails alone: lower runtime.generation_batch_size if memory runs out"
                ) from failed
            logger.warning("%s: its samples are searched for the cause", failed)
        culprits = await find_culprits(
            job.groups,
            functools.partial(_run_part, runtime, phase, job),
            where=f"shard {job.index} of {phase.name} of episode {job.episode}",
            most=runtime.config.runtime.max_quarantined + 1,
        )
        searched_in_vain = not culprits
        if culprits:
            left_out = await blame(culprits)
            job = job.keeping(set(job.samples) - set(left_out))
    handle = ShardHandle(index=job.index, key="", rows=0)
    return handle, NodeReport(module=phase.nodes[-1].module, shard=job.index, rows=0, seconds=0.0)


async def _run_twice(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob
) -> tuple[ShardHandle, NodeReport]:
    """Makes a shard as a whole; once more where it fails, which may be an accident."""
    try:
        return await _run_begun(runtime, phase, job)
    except _Failed as failed:
        logger.warning("%s: the shard is tried again", failed)
    return await _run_begun(runtime, phase, job, suspect=True)


async def _run_part(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob, samples: Sequence[str]
) -> Failure | None:
    """Runs some samples of a shard; how they failed, if they ended or hung a worker."""
    try:
        await _run_begun(runtime, phase, job.part(samples), suspect=True)
    except _Failed as failed:
        return failed.failure
    except UserError:
        # It did not end its worker. What is wrong with it the whole shard will say; and a module
        # may refuse a group that is not whole.
        pass
    return None


async def _run_begun(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob, *, suspect: bool = False
) -> tuple[ShardHandle, NodeReport]:
    """Runs the nodes; again, a few times, where one could not begin or waited in vain itself."""
    from_store = suspect
    for left in reversed(range(_TRIES)):
        try:
            return await _run_nodes(runtime, phase, job, from_store=from_store, suspect=suspect)
        except WaitTimeoutError as e:
            if not left:
                raise
            logger.warning("%s: tried again", e)
            from_store = True
    raise AssertionError("the last try returns or raises")


async def _run_nodes(
    runtime: Runtime, phase: PhaseGraph, job: ShardJob, *, from_store: bool, suspect: bool
) -> tuple[ShardHandle, NodeReport]:
    settings = runtime.config.runtime
    outputs: dict[int, Any] = {}
    if job.base is not None:
        usable = job.base.ref is not None and not from_store
        outputs[BATCH] = job.base.ref if usable else StoredShard(key=job.base.key)
    inside = {n.id for n in phase.nodes}
    last = phase.nodes[-1]
    for node in phase.nodes:
        commits = node is last and bool(job.key)
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
        merged = [i for i in sorted(phase.stored) if commits and i != last.id]
        if commits and job.base is None and BATCH in outputs:
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
            keep_source=takes_source and node is not last,
            merged=tuple(tables.add(outputs[i]) for i in merged),
            base=tables.add(outputs[BATCH]) if commits and job.base is not None else None,
            samples=frozenset(job.samples) if job.is_cut else None,
            version=job.versions.get(node.module),
            batch_size=runtime.config.for_model(node.module).generation_batch_size,
            commit_key=job.key if commits else None,
        )
        try:
            table, source, report = await runtime.pools[node.module].call(
                "forward",
                call,
                *tables.refs,
                what=_what(phase, job, node),
                timeout_s=settings.shard_timeout_s,
                # Who holds a replica may have to bring it up first, and to its version.
                wait_s=settings.shard_timeout_s
                + settings.setup_timeout_s
                + settings.sync_timeout_s,
                version=job.versions.get(node.module),
                num_returns=3,
                suspect=suspect,
            )
        except (ReplicaDiedError, NoAnswerError) as e:
            raise _Failed(node, e) from e
        outputs[node.id] = table
        if takes_source and node is not last:
            outputs[BATCH] = source
    handle = ShardHandle(index=job.index, key=report.key, rows=report.rows, ref=outputs[last.id])
    return handle, report


def _what(phase: PhaseGraph, job: ShardJob, node: Node) -> str:
    """Names a node's work on a shard, or on a part of it, to the pool and to who reads of it."""
    shard = f"shard {job.index} of {phase.name} of episode {job.episode} ({node.label})"
    if job.key:
        return shard
    samples = job.samples
    more = f" to {samples[-1]}" if len(samples) > 1 else ""
    return f"{samples[0]}{more} of {shard}, to find what ends its worker"


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


def volume(reports: Sequence[NodeReport]) -> dict[str, float]:
    """How much was made: `rows`, and where completions have tokens, their `tokens`."""
    lengths = [r.metrics["response_length"] for r in reports if "response_length" in r.metrics]
    made = {"rows": float(sum(r.rows for r in reports))}
    return made | {"tokens": sum(mean * rows for mean, rows in lengths)} if lengths else made
