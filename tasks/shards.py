"""One shard of an episode, made by its phase or adopted: the same job in its turn and in a repair.

Which samples it holds is a function of the plan and of the records of quarantine, and so are their
seeds: made again, it has the same bits. Knows nothing of damage but to let it through (`repair`).
"""

from __future__ import annotations

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.pools import NodeReport, Source
from rlhf_flows.store import ShardPhase
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, run_shard
from rlhf_flows.tasks.quarantine import blame_in_episode
from rlhf_flows.tasks.runtime import EpisodeData, Runtime

__all__ = ["make_shard"]


async def make_shard(
    runtime: Runtime, data: EpisodeData, phase: ShardPhase, index: int
) -> tuple[ShardHandle, NodeReport]:
    """Makes one shard, or adopts the one that is there, under the generation that counts next.

    Raises ShardDamageError where one is damaged: the adopted one, or the rollout shard that it
    starts from.
    """
    assert runtime.environment is not None
    nodes = runtime.rollout_nodes if phase == "rollout" else runtime.scoring_nodes
    graph = PhaseGraph.of(phase, runtime.environment, nodes)
    blame = blame_in_episode(runtime, data, phase)
    return await run_shard(runtime, graph, _job(runtime, data, phase, index), blame=blame)


def _job(runtime: Runtime, data: EpisodeData, phase: ShardPhase, index: int) -> ShardJob:
    plan = data.plan
    generation = runtime.next_generation(phase, plan.episode, index)
    from_rollout = phase == "scoring" and bool(runtime.rollout_nodes)
    job = ShardJob(
        index=index,
        episode=plan.episode,
        key=runtime.layout.shard(phase, plan.episode, index, generation),
        versions={**plan.versions, **dict.fromkeys(runtime.trained_in(phase), plan.episode)},
        groups=plan.groups(index),
        source=None if from_rollout else Source(dataset="train", columns=plan.samples(index)),
        base=data.rollout[index] if from_rollout else None,
    )
    return job.keeping({name for group in data.quarantine.kept(phase, index) for name in group})
