"""Param sync: the new weights into every replica that samples with them, checked twice.

Replicas that take the same weights share one stream of them, whichever module they are of. The
digest of the bytes is checked before they are loaded, log-probabilities of probe sequences
after: some engines re-lay weights as they load, so they cannot be read back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from prefect import task

from rlhf_flows.errors import SyncError
from rlhf_flows.pools import Pool
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import Runtime
from rlhf_flows.tasks.weights import SyncPair
from rlhf_flows.together import together

__all__ = ["param_sync"]

_PROBE_TIMEOUT_S = 120.0
_TOLERANCE = {"float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
"""Mean distance of probe logprobs that two exact implementations of one model may show."""


@task(name="param_sync", task_run_name="param sync to version {version}", **PHASE)
async def param_sync(runtime: Runtime, version: int) -> dict[str, Any]:
    """Brings every sampler that is due to `version`. Leaves no record: each attempt asks what is
    held.
    """
    started = time.perf_counter()
    due = [pair for pair in runtime.syncs if runtime.is_due(pair.target, version)]
    runtime.progress.started("param_sync", version, len(due))
    async with together() as group:
        syncs = [group.create_task(_sync(runtime, pairs, version)) for pairs in _alike(due)]
    gaps = [gap for sync in syncs for gap in sync.result()]
    seconds = time.perf_counter() - started
    metrics = {"probe_gap": max(found)} if (found := [g for g in gaps if g is not None]) else {}
    runtime.progress.finished("param_sync", version, seconds, metrics)
    return {"version": version, "seconds": seconds, **metrics}


def _alike(due: Sequence[SyncPair]) -> list[list[SyncPair]]:
    """Pairs whose targets take the same weights, and so share a stream."""
    groups: dict[tuple[str, str], list[SyncPair]] = {}
    for pair in due:
        groups.setdefault((pair.source, pair.average), []).append(pair)
    return list(groups.values())


async def _sync(
    runtime: Runtime, pairs: Sequence[SyncPair], version: int
) -> Sequence[float | None]:
    pools = {pair.target: runtime.pools[pair.target] for pair in pairs}
    async with AsyncExitStack() as still:
        for name in sorted(pools):  # in one order, whoever else asks for several
            await still.enter_async_context(pools[name].moving)
        await _bring(runtime, pairs[0], list(pools.values()), version)
        if not runtime.config.runtime.sync_probe:
            return []
        async with together() as group:
            probes = [group.create_task(_probe(runtime, pair, version)) for pair in pairs]
        return [probe.result() for probe in probes]


async def _bring(runtime: Runtime, pair: SyncPair, pools: Sequence[Pool], version: int) -> None:
    """All replicas of the pools, which follow the same weights as the target of `pair`."""
    every = [(pool, replica) for pool in pools for replica in pool.replicas]
    async with together() as group:
        for pool, replica in every:
            if not replica.alive:
                group.create_task(pool.rebuild(replica))
    behind = [(pool, replica) for pool, replica in every if replica.version != version]
    if version:
        await runtime.weights.bring_all(pair, behind, version)
    else:
        async with together() as group:
            for pool, replica in behind:
                group.create_task(runtime.weights.bring_to(pool, replica, version))


async def _probe(runtime: Runtime, pair: SyncPair, version: int) -> float | None:
    """The mean distance of logprobs between what the trainer committed and the samplers."""
    if version == 0:
        return None  # both are as their `setup` left them
    probe = (await runtime.weights.followed(pair, version)).probe
    if probe is None:
        return None
    pool = runtime.pools[pair.target]
    found = await pool.broadcast(
        "probe",
        runtime.attempt,
        probe.sequences,
        what=f"probing the weights of version {version}",
        timeout_s=_PROBE_TIMEOUT_S,
    )
    gap = max(_distance(probe.logprobs, logprobs) for logprobs in found)
    tolerance = _TOLERANCE.get(probe.dtype, _TOLERANCE["bfloat16"])
    if gap > tolerance:
        raise SyncError(
            f"after the sync to version {version}, {pair.target!r} gives logprobs that are"
            f" {gap:.4f} off those of {pair.source!r} on average (allowed {tolerance} in"
            f" {probe.dtype}): the two do not hold the same model; check that both start from the"
            " same folder"
        )
    return gap


def _distance(expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> float:
    pairs = [
        (a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / max(1, len(pairs))
