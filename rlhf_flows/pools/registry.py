"""Which actors of which runs live on a cluster; and their end."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from rlhf_flows.config import ClusterConfig
from rlhf_flows.pools.actors import namespace_of
from rlhf_flows.pools.cluster import connect
from rlhf_flows.pools.rooms import give_back, rooms

__all__ = ["LivingActor", "living_actors", "release_actors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingActor:
    """One rank of one replica of a pool."""

    run: str
    pool: str
    replica: int
    rank: int


async def living_actors(address: str) -> list[LivingActor]:
    """The actors of all runs on the cluster at `address`, in order."""
    await connect(ClusterConfig(address=address))
    prefix = namespace_of("")
    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"].startswith(prefix):
            pool, replica, rank = actor["name"].split("/")
            run = actor["namespace"].removeprefix(prefix)
            found.append(LivingActor(run=run, pool=pool, replica=int(replica), rank=int(rank)))
    return sorted(found, key=lambda a: (a.run, a.pool, a.replica, a.rank))


async def release_actors(address: str, run: str) -> int:
    """Ends every actor of a run, and frees what they hold; returns how many there were."""
    await connect(ClusterConfig(address=address))
    namespace = namespace_of(run)
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace
    ]
    for name in names:
        ray.kill(ray.get_actor(name, namespace), no_restart=True)
    give_back(rooms(f"{namespace}/"))
    return len(names)
