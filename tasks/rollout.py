"""Rollout: the part of the environment that samples from a model, shard by shard."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from prefect import task

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.errors import ShardDamageError, StoreDamageError
from rlhf_flows.pools import NodeReport, Source
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, mean_metrics, run_shard
from rlhf_flows.tasks.quarantine import blame_in_episode
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.together import together

__all__ = ["rollout", "sample_again", "sample_shard"]


@task(name="rollout", task_run_name="rollout {episode}", **PHASE)
async def rollout(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Samples the shards of an episode that are not there; each is committed as it exists."""
    started = time.perf_counter()
    data = await runtime.episode(episode)
    phase = _phase(runtime)
    for node in phase.nodes:
        runtime.pools[node.module].begin_phase()
    missing = data.rollout.missing
    runtime.progress.started("rollout", episode, len(data.plan.shards))
    runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)

    async def make(index: int) -> dict[str, tuple[float, int]]:
        handle, report = await sample_shard(runtime, data, index, phase)
        data.rollout.append(handle)
        runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)
        return dict(report.metrics)

    async with together() as group:
        made = [group.create_task(make(index)) for index in missing]
    metrics = mean_metrics([m.result() for m in made])
    seconds = time.perf_counter() - started
    runtime.progress.finished("rollout", episode, seconds, metrics)
    return {"episode": episode, "shards": len(missing), "seconds": seconds, **metrics}


def _phase(runtime: Runtime) -> PhaseGraph:
    assert runtime.environment is not None
    return PhaseGraph.of("rollout", runtime.environment, runtime.rollout_nodes)


async def sample_shard(
    runtime: Runtime, data: EpisodeData, index: int, phase: PhaseGraph | None = None
) -> tuple[ShardHandle, NodeReport]:
    """Samples one shard, or adopts it, under the generation that counts next."""
    plan = data.plan
    generation = runtime.next_generation("rollout", plan.episode, index)
    job = ShardJob(
        index=index,
        episode=plan.episode,
        key=runtime.layout.shard("rollout", plan.episode, index, generation),
        versions=plan.versions,
        groups=plan.groups(index),
        source=Source(dataset="train", columns=plan.samples(index)),
    )
    job = job.keeping({name for group in data.quarantine.kept("rollout", index) for name in group})
    blame = blame_in_episode(runtime, data, "rollout")
    return await run_shard(runtime, phase or _phase(runtime), job, blame=blame)


async def sample_again(runtime: Runtime, data: EpisodeData, damage: ShardDamageError) -> None:
    """Buries a damaged rollout shard and puts its next generation in its place.

    The samples are the same, as plan, seeds and weights are. Raises StoreDamageError where
    retention has deleted the weights that sampled them.
    """
    for module, version in data.plan.versions.items():
        if runtime.weights_are_deleted(version):
            raise StoreDamageError(
                f"{damage}. It cannot be made again: version {version}, from which {module!r}"
                " sampled it, was deleted by retention; restore the object from a backup, or"
                " start a run of a higher runtime.keep_last"
            ) from damage
    parts = await runtime.bury(damage)
    async with contextlib.AsyncExitStack() as still:
        for module in sorted(data.plan.versions):
            await still.enter_async_context(runtime.pools[module].moving)
        handle, _ = await sample_shard(runtime, data, parts.index)
    data.rollout.replace(handle)
