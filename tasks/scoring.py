"""Scoring: the rest of the environment (rewards, references, values), as rollout shards come in."""

from __future__ import annotations

import time
from typing import Any

from prefect import task

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.errors import ShardDamageError
from rlhf_flows.pools import NodeReport, Source
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, mean_metrics, run_shard
from rlhf_flows.tasks.quarantine import blame_in_episode
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.rollout import sample_again
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.together import together

__all__ = ["score_shard", "scoring"]


@task(name="scoring", task_run_name="scoring {episode}", **PHASE)
async def scoring(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Scores the shards of an episode that are not scored, each as soon as it is sampled."""
    started: float | None = None
    data = await runtime.episode(episode)
    phase = _phase(runtime)
    for node in phase.nodes:
        runtime.pools[node.module].begin_phase()
    missing = set(data.scored.missing)
    runtime.progress.started("scoring", episode, len(data.plan.shards))
    runtime.progress.advanced("scoring", episode, data.scored.num_arrived)

    async def make(index: int) -> NodeReport:
        nonlocal started
        # Waiting for the first shard is the rollout's time, not scoring's.
        started = started or time.perf_counter()
        handle, report = await score_shard(runtime, data, index, phase)
        data.scored.append(handle)
        runtime.progress.advanced("scoring", episode, data.scored.num_arrived)
        return report

    async with together() as group:
        made = []
        if runtime.rollout_nodes:
            async for handle in data.rollout:
                if handle.index in missing:
                    made.append(group.create_task(make(handle.index)))
        else:
            made += [group.create_task(make(index)) for index in sorted(missing)]
    reports = [m.result() for m in made]
    metrics = mean_metrics([r.metrics for r in reports])
    seconds = 0.0 if started is None else time.perf_counter() - started
    previews = sorted((r.shard, r.previews) for r in reports)
    runtime.progress.samples(episode, [p for _, some in previews[:2] for p in some])
    runtime.progress.finished("scoring", episode, seconds, metrics)
    return {"episode": episode, "shards": len(made), "seconds": seconds, **metrics}


def _phase(runtime: Runtime) -> PhaseGraph:
    assert runtime.environment is not None
    return PhaseGraph.of("scoring", runtime.environment, runtime.scoring_nodes)


async def score_shard(
    runtime: Runtime, data: EpisodeData, index: int, phase: PhaseGraph | None = None
) -> tuple[ShardHandle, NodeReport]:
    """Scores one shard, or adopts it, under the generation that counts next.

    A rollout shard that turns out to be damaged is sampled again first.
    """
    blame = blame_in_episode(runtime, data, "scoring")
    while True:
        try:
            return await run_shard(
                runtime, phase or _phase(runtime), _job(runtime, data, index), blame=blame
            )
        except ShardDamageError as damage:
            await sample_again(runtime, data, damage)


def _job(runtime: Runtime, data: EpisodeData, index: int) -> ShardJob:
    plan = data.plan
    generation = runtime.next_generation("scoring", plan.episode, index)
    base, source = None, None
    if runtime.rollout_nodes:
        base = data.rollout[index]
    else:
        source = Source(dataset="train", columns=plan.samples(index))
    job = ShardJob(
        index=index,
        episode=plan.episode,
        key=runtime.layout.shard("scoring", plan.episode, index, generation),
        versions=plan.versions,
        groups=plan.groups(index),
        source=source,
        base=base,
    )
    return job.keeping({name for group in data.quarantine.kept("scoring", index) for name in group})
