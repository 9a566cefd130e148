"""Trained modules back at the last commit: restored, and trained again between full checkpoints.

Training again goes by the stored shards, and must reproduce the digest of every commit on its way.
"""

from __future__ import annotations

from typing import Literal

from rlhf_flows.errors import StoreDamageError
from rlhf_flows.graph import Node
from rlhf_flows.store import ShardPhase
from rlhf_flows.tasks.repair import make_missing
from rlhf_flows.tasks.runtime import Runtime
from rlhf_flows.tasks.steps import tell_committed, train_episode, trained_nodes, trainer_of
from rlhf_flows.together import together

__all__ = ["ensure_trained", "ensure_version"]


async def ensure_trained(
    runtime: Runtime, phase: ShardPhase | Literal["evaluation"], version: int
) -> None:
    """Brings the trained modules that a phase asks themselves cleanly to `version`."""
    asked = runtime.trained_in(phase)
    async with together() as group:
        for node in trained_nodes(runtime) if asked else ():
            if node.module in asked:
                group.create_task(ensure_version(runtime, node, version))


async def ensure_version(runtime: Runtime, node: Node, version: int) -> None:
    """Brings a trainer cleanly to `version`, the last committed one."""
    pool, replica = trainer_of(runtime, node)
    if replica.alive and replica.state.clean and replica.version == version:
        return
    timeout_s = runtime.config.runtime.setup_timeout_s
    base = await _last_full_checkpoint(runtime, node.module, version)
    if base == 0:
        await pool.rebuild(replica)
    else:
        record = await runtime.weights.checkpoint_of(node.module, base)
        replica.state = await pool.call(
            "restore",
            runtime.attempt,
            record,
            base,
            what=f"restoring version {base} of {node.module}",
            timeout_s=timeout_s,
        )
    if base < version:
        await runtime.look_again()
    for episode in range(base, version):
        await _train_again(runtime, node, episode)


async def _last_full_checkpoint(runtime: Runtime, module: str, version: int) -> int:
    for candidate in range(version, 0, -1):
        if (await runtime.weights.checkpoint_of(module, candidate)).state is not None:
            return candidate
    return 0


async def _train_again(runtime: Runtime, node: Node, episode: int) -> None:
    """Trains on a stored episode that was committed without full state, to the same weights."""
    data = await runtime.episode(episode)
    await make_missing(runtime, data)
    await train_episode(runtime, data, [node], report=False)
    pool, _ = trainer_of(runtime, node)
    digests = await pool.call(
        "weights_digests",
        runtime.attempt,
        what=f"the digests of version {episode + 1} of {node.module}",
        timeout_s=runtime.config.runtime.train_timeout_s,
        as_held=True,
    )
    committed = (await runtime.weights.checkpoint_of(node.module, episode + 1)).digests
    if digests != committed:
        odd = next(name for name in committed if digests.get(name) != committed[name])
        raise StoreDamageError(
            f"training episode {episode} of run {runtime.run!r} again from its stored shards gave"
            f" other weights ({digests.get(odd, '')[:12]}) than were committed"
            f" ({committed[odd][:12]}): resume on the"
            " machine type and thread count of the commit, or set"
            " runtime.save_episode_interval=1 for runs that move"
        )
    tell_committed(runtime, node, episode + 1)
    runtime.forget(episode)
