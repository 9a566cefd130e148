"""Rollout: the part of the environment that samples from a model, shard by shard."""

from __future__ import annotations

import time
from typing import Any

from prefect import task

from rlhf_flows.pools import Source
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, mean_metrics, run_shard, together
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["rollout"]


@task(name="rollout", task_run_name="rollout {episode}", **PHASE)
async def rollout(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Samples the shards of an episode that are not there; each is committed as it exists."""
    started = time.perf_counter()
    data = await runtime.episode(episode)
    assert runtime.environment is not None
    phase = PhaseGraph.of("rollout", runtime.environment, runtime.rollout_nodes)
    for node in phase.nodes:
        runtime.pools[node.module].begin_phase()
    missing = data.rollout.missing
    state = runtime.state.episode(episode)
    runtime.progress.started("rollout", episode, len(data.plan.shards))
    runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)

    async def make(index: int) -> dict[str, tuple[float, int]]:
        generation = state.next_generation("rollout", index)
        job = ShardJob(
            index=index,
            episode=episode,
            key=runtime.layout.shard("rollout", episode, index, generation),
            versions=data.plan.versions,
            source=Source(dataset="train", columns=data.plan.samples(index)),
        )
        handle, report = await run_shard(runtime, phase, job)
        data.rollout.append(handle)
        runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)
        return dict(report.metrics)

    async with together() as group:
        made = [group.create_task(make(index)) for index in missing]
    metrics = mean_metrics([m.result() for m in made])
    seconds = time.perf_counter() - started
    runtime.progress.finished("rollout", episode, seconds, metrics)
    return {"episode": episode, "shards": len(missing), "seconds": seconds, **metrics}
