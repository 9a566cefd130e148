"""Scoring: the rest of the environment (rewards, references, values), as rollout shards come in."""

from __future__ import annotations

import time
from typing import Any

from prefect import task

from rlhf_flows.pools import NodeReport
from rlhf_flows.tasks.catching_up import ensure_trained
from rlhf_flows.tasks.dispatch import mean_metrics, volume
from rlhf_flows.tasks.repair import make_sound
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import Runtime
from rlhf_flows.together import together

__all__ = ["scoring"]


@task(name="scoring", task_run_name="scoring {episode}", **PHASE)
async def scoring(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Scores the shards of an episode that are not scored, each as soon as it is sampled."""
    started: float | None = None
    await runtime.begin("scoring", episode)
    data = await runtime.episode(episode)
    await ensure_trained(runtime, "scoring", episode)
    missing = set(data.scored.missing)
    runtime.progress.started("scoring", episode, len(data.plan.shards))
    runtime.progress.advanced("scoring", episode, data.scored.num_arrived)

    async def make(index: int) -> NodeReport:
        nonlocal started
        # Waiting for the first shard is the rollout's time, not scoring's.
        started = started or time.perf_counter()
        handle, report = await make_sound(runtime, data, "scoring", index)
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
    metrics = mean_metrics([r.metrics for r in reports]) | volume(reports)
    seconds = 0.0 if started is None else time.perf_counter() - started
    previews = sorted((r.shard, r.previews) for r in reports)
    runtime.progress.samples(episode, [p for _, some in previews[:2] for p in some])
    runtime.progress.finished("scoring", episode, seconds, metrics)
    return {"episode": episode, "shards": len(made), "seconds": seconds, **metrics}
