"""Which weights and training states are kept: the newest few, and what somebody still needs.

A plan to come may name a version, and an evaluation that is due needs its own, whoever dies
meanwhile: a sampler that comes back, or the next attempt, takes the weights from here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from rlhf_flows.pools import CheckpointRecord
from rlhf_flows.store import FolderRecord, delete_folder
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["retain"]


async def retain(runtime: Runtime, *, newest: int, needed: Collection[int] = ()) -> None:
    """Deletes what is older than `runtime.keep_last` versions and named by no plan to come.

    Training state is kept for the last `keep_last` full checkpoints, so that a run with
    `save_episode_interval` above 1 always has one to go back to.

    Args:
        newest: The newest policy version.
        needed: Versions whose weights are kept in any case: those still to be evaluated.
    """
    keep_last = runtime.config.runtime.keep_last
    # The oldest version that an unfinished episode samples from.
    named = runtime.sampling_version(newest)
    left = set(range(1, newest + 1)) - runtime.weights.versions_without_weights()
    full = 0
    doomed: list[FolderRecord] = []
    for version in range(newest, 0, -1):
        payload = await runtime.weights.commit_of(version)
        records = [CheckpointRecord.from_json(entry) for entry in payload["checkpoints"].values()]
        is_settled = full >= keep_last
        is_old = version <= newest - keep_last and version < named and version not in needed
        old = [r.state for r in records if r.state is not None and is_settled]
        if is_settled and is_old:
            old += [folder for r in records for folder in r.weights_folders]
        full += any(r.state is not None for r in records)
        are_gone = bool(old) and runtime.weights.gone.issuperset(folder.prefix for folder in old)
        if are_gone and min(left, default=newest) > version:
            break  # an earlier call was here already, and has left nothing below
        doomed += old
    # The oldest first: whoever is killed here leaves no gap that would hide what is below it.
    for folder in reversed(doomed):
        if folder.prefix not in runtime.weights.gone:
            reason = f"retention after version {newest}"
            await asyncio.to_thread(delete_folder, runtime.store, runtime.layout, folder, reason)
            runtime.weights.gone.add(folder.prefix)
