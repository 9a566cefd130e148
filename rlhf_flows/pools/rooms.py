"""Room for all ranks of a replica at once, on one node where one has it: a placement group of Ray.

The decision here: ranks that ask for GPUs or CPUs get all of them or none, so that two groups never
wait for each other's half. A room belongs to a run, as its actors do: the next attempt finds it by
name, a replaced replica moves into the same one, and it ends with the pool, or with the lease.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_flows.errors import NoAnswerError

__all__ = ["PlacementGroup", "give_back", "rooms", "seat", "take_room"]

_WAIT_S = 1.0


async def take_room(
    name: str, needs: Mapping[str, float], *, ranks: int, timeout_s: float, waiting_for: str
) -> PlacementGroup:
    """The room of this name, with what each of its ranks needs; made unless it is there.

    Raises:
        NoAnswerError: the cluster has no room for all ranks; none is kept.
    """
    bundles = [dict(needs) for _ in range(ranks)]
    found = [room for other, room in _all() if other == name]
    if not (found and found[0].bundle_specs == bundles):
        give_back({name})  # of an attempt that asked for something else
        found = [placement_group(bundles, strategy="PACK", name=name, lifetime="detached")]
    room = found[0]
    deadline = time.monotonic() + timeout_s
    try:
        while not await asyncio.to_thread(room.wait, _WAIT_S):
            if time.monotonic() > deadline:
                each = " and ".join(f"{n:g} {what}" for what, n in needs.items())
                free = ray.available_resources()
                left = " and ".join(f"{free.get(what, 0):g} {what}" for what in needs)
                raise NoAnswerError(
                    f"waited {timeout_s:g} s for {waiting_for}: its {ranks} ranks ask for {each}"
                    f" each, and the cluster has {left} left: ask for less, add a node, or allow"
                    " a longer runtime.setup_timeout_s"
                )
    except BaseException:  # cancelled as well: what nobody waits for would be reserved for ever
        ray.util.remove_placement_group(room)
        raise
    return room


def seat(room: PlacementGroup, rank: int) -> Any:
    """Where Ray is to start a rank."""
    return PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank)


def rooms(prefix: str) -> set[str]:
    """Names of the rooms on the cluster that start so."""
    return {name for name, _ in _all() if name.startswith(prefix)}


def give_back(names: Collection[str]) -> None:
    for name, room in _all() if names else ():
        if name in names:
            ray.util.remove_placement_group(room)


def _all() -> list[tuple[str, PlacementGroup]]:
    """Ray finds names in one namespace alone, and each flow has its own."""
    return [
        (about["name"], PlacementGroup(ray.PlacementGroupID.from_hex(key), _bundles(about)))
        for key, about in placement_group_table().items()
        if about["state"] != "REMOVED"
    ]


def _bundles(about: Mapping[str, Any]) -> list[dict[str, float]]:
    return [dict(about["bundles"][index]) for index in sorted(about["bundles"])]
