"""Training on relayed samples: what a user's function makes of the last episodes, in their worker.

The function is asked anew whenever the episode is trained, by each trained module; it sees the
stored shards in the order of their plans, so that it returns the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_flows.errors import DataError, ShardDamageError
from rlhf_flows.graph import Node
from rlhf_flows.pools import StoredShard
from rlhf_flows.pools.messages import RELAYED, RelayCall, TrainCall, TrainRows
from rlhf_flows.store import parse_key
from rlhf_flows.tasks.repair import make_missing, repair
from rlhf_flows.tasks.runtime import EpisodeData, Runtime
from rlhf_flows.together import together

__all__ = ["relay_batches", "relay_samples", "takes_relayed"]


def takes_relayed(runtime: Runtime, episode: int) -> bool:
    """Whether training of an episode takes what the relay function returns."""
    settings = runtime.config.runtime
    return bool(settings.max_relay_episode) and episode >= settings.relay_episode_offset


async def relay_samples(runtime: Runtime, data: EpisodeData, nodes: Sequence[Node]) -> int:
    """Every trained module asks the function; the number of samples that it returned.

    Raises DataError where modules got different numbers.
    """
    shown = _shown(runtime, data.plan.episode)
    if len(shown) > 1:
        await runtime.look_again()  # what was made since, and let go of
    episodes = [await runtime.episode(number) for number in shown]
    for other in episodes[:-1]:
        await make_missing(runtime, other)
    settings = runtime.config.runtime
    await data.scored.wait_for(range(len(data.plan.shards)), timeout_s=settings.train_timeout_s)
    async with together() as group:
        asked = {n.module: group.create_task(_ask(runtime, n, episodes)) for n in nodes}
    for other in episodes[:-1]:
        runtime.forget(other.plan.episode)
    counts = {module: task.result() for module, task in asked.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"the relay function returned different numbers of samples to the modules ({counts}):"
            " it must depend on the buffers that it is given alone"
        )
    return counts.popitem()[1]


def _shown(runtime: Runtime, episode: int) -> range:
    """The episodes that the function is shown, the newest last."""
    most = runtime.config.runtime.max_relay_episode
    return range(0 if most < 0 else max(0, episode - most + 1), episode + 1)


async def _ask(runtime: Runtime, node: Node, episodes: Sequence[EpisodeData]) -> int:
    settings = runtime.config.runtime
    newest = episodes[-1].plan
    while True:
        tables = [_tables(data) for data in episodes]
        call = RelayCall(
            attempt=runtime.attempt,
            episode=newest.episode,
            version=newest.episode,
            episodes=tuple(
                (data.plan.episode, tuple(len(shard) for shard in shards))
                for data, shards in zip(episodes, tables, strict=True)
            ),
            left_out=frozenset().union(
                *(data.quarantine.left_out(range(len(data.plan.shards))) for data in episodes)
            ),
            expected=newest.num_samples if settings.stream_data_loader_type == "fixed" else None,
        )
        try:
            count: int = await runtime.pools[node.module].call(
                "relay",
                call,
                *[table for shards in tables for shard in shards for table in shard],
                what=f"relaying samples of episode {newest.episode} to {node.module}",
                timeout_s=settings.train_timeout_s,
                as_held=True,
            )
        except ShardDamageError as damage:
            parts = parse_key(runtime.run, damage.key)
            assert parts is not None
            await repair(runtime, episodes[parts.episode - newest.episode - 1], damage)
        else:
            return count


def _tables(data: EpisodeData) -> list[list[StoredShard]]:
    """The shards of an episode, each in its parts."""
    shards = []
    for index in range(len(data.plan.shards)):
        parts = [data.scored[index]]
        if data.scored is not data.rollout and index not in data.rollout.missing:
            parts.insert(0, data.rollout[index])
        if data.scored[index].rows != 0:
            shards.append([StoredShard(key=part.key) for part in parts])
    return shards


def relay_batches(runtime: Runtime, episode: int, count: int) -> list[TrainCall]:
    """The steps of an episode on `count` relayed samples, in their order in each epoch."""
    settings = runtime.config.runtime
    width = settings.samples_per_batch
    batches = [
        range(start, min(start + width, count))
        for _ in range(settings.num_training_epoch)
        for start in range(0, count, width)
    ]
    rows = [(TrainRows(shard=RELAYED, rows=tuple(batch)),) for batch in batches]
    return [
        TrainCall(
            attempt=runtime.attempt,
            episode=episode,
            version=episode,
            index=index,
            iteration=episode * len(rows) + index,
            num_updates=len(rows),
            method="",
            rows=batch,
            episode_rows=tuple(rows) if index == 0 else None,
        )
        for index, batch in enumerate(rows)
    ]
