"""Rollout: the part of the environment that samples from a model, shard by shard."""

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

__all__ = ["rollout"]


@task(name="rollout", task_run_name="rollout {episode}", **PHASE)
async def rollout(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Samples the shards of an episode that are not there; each is committed as it exists."""
    started = time.perf_counter()
    await runtime.begin("rollout", episode)
    data = await runtime.episode(episode)
    await ensure_trained(runtime, "rollout", episode)
    missing = data.rollout.missing
    runtime.progress.started("rollout", episode, len(data.plan.shards))
    runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)

    async def make(index: int) -> NodeReport:
        handle, report = await make_sound(runtime, data, "rollout", index)
        data.rollout.append(handle)
        runtime.progress.advanced("rollout", episode, data.rollout.num_arrived)
        return report

    async with together() as group:
        made = [group.create_task(make(index)) for index in missing]
    reports = [m.result() for m in made]
    metrics = mean_metrics([r.metrics for r in reports]) | volume(reports)
    seconds = time.perf_counter() - started
    runtime.progress.finished("rollout", episode, seconds, metrics)
    return {"episode": episode, "shards": len(missing), "seconds": seconds, **metrics}
