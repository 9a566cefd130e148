"""Puts back what is damaged or missing of the shards that training reads.

What reads a damaged shard names it (`ShardDamageError`). It gets a tombstone, and the next
generation is made by the phase that made it: samples and scores are a function of the plan and of
the records of quarantine, so training, and training again, come to the same weights as before. A
damaged rollout shard leaves the scores of its samples as they are.
"""

from __future__ import annotations

from rlhf_flows.errors import ShardDamageError
from rlhf_flows.store import parse_key
from rlhf_flows.tasks.rollout import sample_again, sample_shard
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.tasks.scoring import score_shard
from rlhf_flows.together import together

__all__ = ["make_missing", "repair"]


async def repair(runtime: Runtime, data: EpisodeData, damage: ShardDamageError) -> None:
    """Buries a damaged shard of an episode and puts its next generation in its place."""
    parts = parse_key(runtime.run, damage.key)
    assert parts is not None
    if parts.phase == "rollout":
        await sample_again(runtime, data, damage)
        return
    await runtime.bury(damage)
    handle, _ = await score_shard(runtime, data, parts.index)
    data.scored.replace(handle)


async def make_missing(runtime: Runtime, data: EpisodeData) -> None:
    """Makes the shards that a trained episode lacks: an attempt died between a tombstone and the
    generation after it, and no phase of the episode will be run again.
    """
    if runtime.environment is None:
        return

    async def make(index: int) -> None:
        if runtime.rollout_nodes and index in data.rollout.missing:
            data.rollout.append((await sample_shard(runtime, data, index))[0])
        if index in data.scored.missing:
            data.scored.append((await score_shard(runtime, data, index))[0])

    lacking = {*data.scored.missing, *(data.rollout.missing if runtime.rollout_nodes else ())}
    async with together() as group:
        for index in sorted(lacking):
            group.create_task(make(index))
