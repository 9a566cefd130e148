"""Training: the steps of an episode, then the one commit of all that evolved.

A trainer that is not cleanly at the version of the last commit goes back to it first. Where
samplers may lag behind, the next training does not wait for the commit (`ahead`): the upload goes
on beside it, and ends in the same commit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import task

from rlhf_flows.errors import NonFiniteError, PoolError
from rlhf_flows.graph import Node
from rlhf_flows.pools import CheckpointRecord, joined
from rlhf_flows.store import commit_json
from rlhf_flows.tasks.ahead import VersionLostError
from rlhf_flows.tasks.catching_up import ensure_version
from rlhf_flows.tasks.guarding import judge, look_back, stopped_by_nan
from rlhf_flows.tasks.relay import takes_relayed
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.tasks.steps import tell_committed, train_episode, trained_nodes, trainer_of
from rlhf_flows.together import together

__all__ = ["training"]

logger = logging.getLogger(__name__)


@task(name="training", task_run_name="training {episode}", **PHASE)
async def training(runtime: Runtime, episode: int) -> dict[str, Any]:
    """Trains every trainable module on an episode and commits policy version `episode + 1`.

    Where training goes ahead, that of the next episode begins once the files of this one are
    written; the commit waits for their upload. Raises GuardRailError where what was committed
    breaks a guard rail.
    """
    started = time.perf_counter()
    data = await runtime.episode(episode)
    nodes = trained_nodes(runtime)
    try:
        metrics, records = await _trained(runtime, data, nodes)
    except NonFiniteError as e:
        raise await stopped_by_nan(runtime, episode, e) from e
    try:
        rows = _row_counts(runtime, data, nodes[0], metrics)
        if records is None:
            runtime.ahead.write(episode + 1)
            async with together() as group:
                uploads = [group.create_task(_uploaded(runtime, n, episode + 1)) for n in nodes]
            records = [upload.result() for upload in uploads]
        await look_back(runtime, episode)  # nothing may fail between the commit and the verdict
        await _commit(runtime, data, records, metrics, rows, time.perf_counter() - started)
    except BaseException:  # cancelled as well: who trains on it must not wait for it
        runtime.ahead.lose()
        raise
    for node in nodes:
        tell_committed(runtime, node, episode + 1)
    seconds = time.perf_counter() - started
    runtime.progress.finished("training", episode, seconds, metrics)
    # Before the next commit may come: whoever looks later must find the same episode the newest.
    await judge(runtime, episode)
    runtime.ahead.commit(episode + 1)
    return {"episode": episode, "version": episode + 1, "seconds": seconds, **metrics}


async def _trained(
    runtime: Runtime, data: EpisodeData, nodes: Sequence[Node]
) -> tuple[dict[str, float], list[CheckpointRecord] | None]:
    """The metrics of all steps, and the checkpoints; None where these are only written."""
    episode = data.plan.episode
    while True:
        try:
            async with runtime.ahead.training_from(episode):
                async with together() as group:
                    for node in nodes:
                        group.create_task(_stand_on(runtime, node, episode))
                metrics = await train_episode(runtime, data, nodes, report=True)
                # Nothing of the next plan hangs on this training: nobody has to wait for it later.
                async with together() as group:
                    group.create_task(runtime.prepare(episode + 1))
                    saving = group.create_task(_checkpoints(runtime, nodes, version=episode + 1))
                return metrics, saving.result()
        except VersionLostError as e:
            logger.warning("training of episode %d: %s", episode, e)


async def _stand_on(runtime: Runtime, node: Node, version: int) -> None:
    """Brings a trainer to `version`, or leaves it there if that is only written yet."""
    _, replica = trainer_of(runtime, node)
    if not (replica.alive and replica.state.trained == version):
        await runtime.ahead.until_committed(version)
        await ensure_version(runtime, node, version)


# ---- the checkpoints --------------------------------------------------------------------------


def _goes_ahead(runtime: Runtime, nodes: Sequence[Node], episode: int) -> bool:
    """Whether training of the next episode may begin before the commit of this one."""
    if runtime.trained_in("evaluation") or episode + 1 == runtime.config.runtime.num_episode:
        return False
    return all(runtime.pools[node.module].spec.works_beside for node in nodes)


async def _checkpoints(
    runtime: Runtime, nodes: Sequence[Node], *, version: int
) -> list[CheckpointRecord] | None:
    """The records; None where the files are only written, as training is to go on."""
    # Commits come one after another, and one lies on the trainer's disk at most.
    await runtime.ahead.until_committed(version - 1)
    goes_ahead = _goes_ahead(runtime, nodes, version - 1)
    method = "write_checkpoint" if goes_ahead else "checkpoint"
    async with together() as group:
        saving = [
            group.create_task(_checkpoint(runtime, node, method, version=version)) for node in nodes
        ]
    return None if goes_ahead else [saved.result() for saved in saving]


async def _checkpoint(runtime: Runtime, node: Node, method: str, *, version: int) -> Any:
    settings = runtime.config.runtime
    is_last = version == settings.num_episode
    pool, _ = trainer_of(runtime, node)
    return await pool.call(
        method,
        runtime.attempt,
        version,
        is_last or version % settings.save_episode_interval == 0,
        what=f"the checkpoint of version {version} of {node.module}",
        timeout_s=settings.train_timeout_s,
        as_held=True,
    )


async def _uploaded(runtime: Runtime, node: Node, version: int) -> CheckpointRecord:
    """The record of what was written, once all ranks have it in the store."""
    pool, replica = trainer_of(runtime, node)
    records = await pool.beside(
        replica,
        "uploaded",
        runtime.attempt,
        version,
        what=f"the upload of version {version} of {node.module}",
        timeout_s=runtime.config.runtime.train_timeout_s,
    )
    return joined(records)


# ---- the commit -------------------------------------------------------------------------------


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
        "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)},
        "seconds": seconds,
    }
    if nonfinite := sorted(k for k, v in metrics.items() if not math.isfinite(v)):
        payload["nonfinite"] = nonfinite  # JSON has no numbers for them
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
