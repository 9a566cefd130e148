"""Which weights and training states are kept: the newest few, and what a plan may still name."""

from __future__ import annotations

import asyncio

from rlhf_flows.pools import CheckpointRecord
from rlhf_flows.store import delete_folder
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["retain"]


async def retain(runtime: Runtime, *, newest: int) -> None:
    """Deletes what is older than `runtime.keep_last` versions and named by no plan to come.

    Training state is kept for the last `keep_last` full checkpoints, so that a run with
    `save_episode_interval` above 1 always has one to go back to.
    """
    settings = runtime.config.runtime
    # The oldest version that an unfinished episode samples from.
    named = runtime.sampling_version(newest)
    full = 0
    gone = frozenset(runtime.gone)
    for version in range(newest, 0, -1):
        payload = await runtime.commit_of(version)
        is_full = False
        all_doomed = []
        for entry in payload["checkpoints"].values():
            record = CheckpointRecord.from_json(entry)
            is_full = is_full or record.state is not None
            doomed = []
            if record.state is not None and full >= settings.keep_last:
                doomed.append(record.state)
            if (
                record.weights is not None
                and version <= newest - settings.keep_last
                and version < named
                and full >= settings.keep_last
            ):
                doomed.append(record.weights)
            all_doomed += [folder.prefix for folder in doomed]
            for folder in doomed:
                if folder.prefix not in runtime.gone:
                    await asyncio.to_thread(
                        delete_folder,
                        runtime.store,
                        runtime.layout,
                        folder,
                        f"retention after version {newest}",
                    )
                    runtime.gone.add(folder.prefix)
        full += is_full
        if all_doomed and gone.issuperset(all_doomed):
            break  # an earlier call was here already
