"""Puts back what is damaged or missing of the shards of an episode.

What reads a damaged shard names it (`ShardDamageError`). It gets a tombstone, and the next
generation is made by the phase that made it: samples and scores are a function of the plan and of
the records of quarantine, so training, and training again, come to the same weights as before. A
damaged rollout shard leaves the scores of its samples as they are.

The turn of such a shard is over: the samplers may hold newer versions by now. So it is made while
none of them is being moved, and refused where retention has deleted the weights, before a tombstone
stands that no next generation would follow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from rlhf_flows.data.stream import ShardHandle
from rlhf_flows.errors import ShardDamageError, StoreDamageError
from rlhf_flows.pools import NodeReport
from rlhf_flows.store import ShardPhase, parse_key
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.tasks.shards import make_shard
from rlhf_flows.together import together

__all__ = ["make_missing", "make_sound", "repair"]


async def make_sound(
    runtime: Runtime, data: EpisodeData, phase: ShardPhase, index: int, *, late: bool = False
) -> tuple[ShardHandle, NodeReport]:
    """Makes one shard, or adopts it; what turns out to be damaged on the way is made again.

    Args:
        late: Its turn is over; in its turn, the edges of the flow keep the samplers where they are.
    """
    while True:
        try:
            async with _samplers_at_rest(runtime, data, phase) if late else nullcontext():
                return await make_shard(runtime, data, phase, index)
        except ShardDamageError as damage:
            if _place(runtime, damage)[0] == phase:
                # The adopted one: the next generation is made instead.
                await runtime.bury(damage)
            else:
                await repair(runtime, data, damage)


async def repair(runtime: Runtime, data: EpisodeData, damage: ShardDamageError) -> None:
    """Buries a damaged shard of an episode and puts its next generation in its place."""
    phase, index = _place(runtime, damage)
    _refuse_what_is_lost(runtime, data, phase, str(damage), damage)
    await runtime.bury(damage)
    handle, _ = await make_sound(runtime, data, phase, index, late=True)
    data.stream(phase).replace(handle)


async def make_missing(runtime: Runtime, data: EpisodeData) -> None:
    """Makes the shards that a trained episode lacks: an attempt died between a tombstone and the
    generation after it, and no phase of the episode will be run again.
    """
    phases: list[ShardPhase] = []
    if runtime.rollout_nodes:
        phases.append("rollout")
    if runtime.scoring_nodes:
        phases.append("scoring")

    async def make(index: int) -> None:
        for phase in phases:
            if index in data.stream(phase).missing:
                what = f"shard {index} of {phase} of episode {data.plan.episode} is not there"
                _refuse_what_is_lost(runtime, data, phase, what)
                handle, _ = await make_sound(runtime, data, phase, index, late=True)
                data.stream(phase).append(handle)

    async with together() as group:
        for index in sorted({index for phase in phases for index in data.stream(phase).missing}):
            group.create_task(make(index))


def _place(runtime: Runtime, damage: ShardDamageError) -> tuple[ShardPhase, int]:
    """Phase and index of the damaged shard."""
    parts = parse_key(runtime.run, damage.key)
    assert parts is not None
    assert parts.phase is not None
    return parts.phase, parts.index


def _versions(runtime: Runtime, data: EpisodeData, phase: ShardPhase) -> dict[str, int]:
    """The policy version of each module that follows a trainer and takes part in the phase."""
    return {name: data.plan.versions[name] for name in runtime.followed_in(phase)}


def _refuse_what_is_lost(
    runtime: Runtime,
    data: EpisodeData,
    phase: ShardPhase,
    what: str,
    cause: ShardDamageError | None = None,
) -> None:
    """Raises StoreDamageError where the weights or the prompts of a shard are gone."""
    from_rollout = phase == "scoring" and bool(runtime.rollout_nodes)
    if not from_rollout and not runtime.has_prompts_of(data):
        raise StoreDamageError(
            f"{what}. It cannot be made again: its prompts were replaced since; restore the object"
            " from a backup, or resume with the prompts of before"
        ) from cause
    for module, version in _versions(runtime, data, phase).items():
        if version in runtime.weights.versions_without_weights():
            raise StoreDamageError(
                f"{what}. It cannot be made again: version {version}, from which {module!r}"
                " made it, was deleted by retention; restore the object from a backup, or"
                " start a run of a higher runtime.keep_last"
            ) from cause


@asynccontextmanager
async def _samplers_at_rest(
    runtime: Runtime, data: EpisodeData, phase: ShardPhase
) -> AsyncIterator[None]:
    """Inside, no param sync moves the modules of the phase. Not to be nested."""
    async with AsyncExitStack() as still:
        for module in sorted(_versions(runtime, data, phase)):
            await still.enter_async_context(runtime.pools[module].moving)
        yield
