"""Training: the steps of an episode, then the one commit of all that evolved.

A trainer that is not cleanly at the version of the last commit goes back to it first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task

from rlhf_flows.errors import PoolError
from rlhf_flows.graph import Node
from rlhf_flows.pools import CheckpointRecord
from rlhf_flows.store import commit_json
from rlhf_flows.tasks.catching_up import ensure_version
from rlhf_flows.tasks.relay import takes_relayed
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.tasks.steps import tell_committed, train_episode, trained_nodes, trainer_of
from rlhf_flows.together import together

__all__ = ["training"]


@task(name="training", task_run_name="training {episode}", **PHASE)
async def training(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Trains every trainable module on an episode and commits policy version `episode + 1`."""
    started = time.perf_counter()
    data = await runtime.episode(episode)
    nodes = trained_nodes(runtime)
    async with together() as group:
        for node in nodes:
            group.create_task(ensure_version(runtime, node, episode))
    metrics = await train_episode(runtime, data, nodes, report=True)
    # Nothing of the next plan hangs on this training: nobody has to wait for it later.
    async with together() as group:
        group.create_task(runtime.prepare(episode + 1))
        saving = [
            group.create_task(_checkpoint(runtime, node, version=episode + 1)) for node in nodes
        ]
    records = [saved.result() for saved in saving]
    rows = _row_counts(runtime, data, nodes[0], metrics)
    await _commit(runtime, data, records, metrics, rows, time.perf_counter() - started)
    for node in nodes:
        tell_committed(runtime, node, episode + 1)
    seconds = time.perf_counter() - started
    runtime.progress.finished("training", episode, seconds, metrics)
    return {"episode": episode, "version": episode + 1, "seconds": seconds, **metrics}


# ---- the commit -------------------------------------------------------------------------------


async def _checkpoint(runtime: Runtime, node: Node, *, version: int) -> CheckpointRecord:
    settings = runtime.config.runtime
    is_last = version == settings.num_episode
    pool, _ = trainer_of(runtime, node)
    record: CheckpointRecord = await pool.call(
        "checkpoint",
        runtime.attempt,
        version,
        is_last or version % settings.save_episode_interval == 0,
        what=f"the checkpoint of version {version} of {node.module}",
        timeout_s=settings.train_timeout_s,
    )
    return record


async def _commit(
    runtime: Runtime,
    data: EpisodeData,
    records: Sequence[CheckpointRecord],
    metrics: Mapping[str, float],
    rows: Mapping[str, int],
    seconds: float,
) -> None:
    """The one commit. Losing the race is fine only to somebody who got the same weights."""
    episode = data.plan.episode
    await runtime.check_fence()
    payload = {
        "episode": episode,
        "version": episode + 1,
        "attempt": runtime.attempt,
        "checkpoints": {r.module: r.to_json() for r in records},
        "rows": dict(rows),
        "quarantined": [record.sample_id for record in data.quarantine.blamed],
        "metrics": {k: v for k, v in metrics.items() if v == v and abs(v) != float("inf")},
        "seconds": seconds,
    }
    commit = await asyncio.to_thread(
        commit_json, runtime.store, runtime.layout.trained(episode), payload
    )
    runtime.weights.commits[episode + 1] = commit.payload
    if commit.mine:
        return
    for record in records:
        theirs = await runtime.weights.checkpoint_of(record.module, episode + 1)
        if theirs.digests != record.digests:
            raise PoolError(
                f"episode {episode} of run {runtime.run!r} was committed by attempt"
                f" {commit.payload.get('attempt')} with other weights of {record.module!r}:"
                " start again to go on from that commit"
            )


def _row_counts(
    runtime: Runtime, data: EpisodeData, node: Node, metrics: Mapping[str, float]
) -> dict[str, int]:
    """Rows of all passes over the episode: each that was planned is one of the other three.

    Of several trained modules, the first one's: all get the same rows.
    """
    passes = runtime.config.runtime.num_training_epoch
    planned = passes * data.plan.num_samples
    quarantined = passes * data.quarantine.num_left_out()
    if takes_relayed(runtime, data.plan.episode):
        # What is trained is not what was planned: the function said what it is.
        of_first = "rows" if "rows" in metrics else f"{node.module}/rows"
        planned, quarantined = round(metrics[of_first]), 0
    given = planned - quarantined
    of_node = "" if "rows" in metrics else f"{node.module}/"
    trained = round(metrics.get(f"{of_node}rows_trained", given))
    return {
        "planned": planned,
        "trained": trained,
        "filtered": given - trained,
        "quarantined": quarantined,
    }
