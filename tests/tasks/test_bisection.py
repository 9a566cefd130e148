"""The search for a culprit: nobody is blamed but who failed twice alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.errors import PoolError
from rlhf_flows.tasks.bisection import Failure, find_culprits

FAILURE = Failure(module="policy", cause="died")


class World:
    """Runs parts of a shard, some samples of which end their worker."""

    def __init__(self, *culprits: str, accidents: Sequence[int] = ()) -> None:
        self.culprits = frozenset(culprits)
        self.accidents = frozenset(accidents)
        """Runs that a kill from outside ends, by number."""
        self.runs: list[tuple[str, ...]] = []

    async def attempt(self, samples: Sequence[str]) -> Failure | None:
        self.runs.append(tuple(samples))
        killed = len(self.runs) - 1 in self.accidents
        return FAILURE if killed or self.culprits.intersection(samples) else None


def shard(groups: int, size: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"g{g}s{s}" for s in range(size)) for g in range(groups))


async def search(world: World, groups: Any, *, most: int = 99) -> dict[str, Failure]:
    return await find_culprits(groups, world.attempt, where="shard 0", most=most)


async def test_halves_are_whole_groups_first_and_then_samples() -> None:
    world = World("g2s1")
    assert await search(world, shard(4, 2)) == {"g2s1": FAILURE}
    assert world.runs == [
        ("g0s0", "g0s1", "g1s0", "g1s1"),
        ("g2s0", "g2s1", "g3s0", "g3s1"),
        ("g2s0", "g2s1"),
        ("g2s0",),
        ("g2s1",),
        ("g2s1",),
        ("g3s0", "g3s1"),
    ]


@given(data=st.data(), groups=st.integers(2, 9), size=st.integers(1, 5))
async def test_one_culprit_of_each_poisoned_group_is_found_each_alone_twice(
    data: st.DataObject, groups: int, size: int
) -> None:
    everything = shard(groups, size)
    poisoned = data.draw(st.sets(st.integers(1, groups - 1), min_size=1))
    culprits = [data.draw(st.sampled_from(everything[g])) for g in sorted(poisoned)]
    world = World(*culprits)
    # The first group is tried before any sample is alone, and goes through.
    found = await search(world, everything)
    assert sorted(found) == sorted(culprits)
    alone = Counter(run[0] for run in world.runs if len(run) == 1)
    assert all(alone[name] >= 2 for name in culprits)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 12), st.booleans())
async def test_a_kill_from_outside_blames_nobody(
    groups: int, size: int, first: int, twice: bool
) -> None:
    accidents = [first, first + 2] if twice and groups * size > 1 else [first]
    world = World(accidents=accidents)
    if groups * size > 1:
        assert await search(world, shard(groups, size)) == {}


async def test_a_shard_that_only_fails_as_a_whole_has_no_culprit() -> None:
    class Large(World):
        async def attempt(self, samples: Sequence[str]) -> Failure | None:
            await super().attempt(samples)
            return FAILURE if len(samples) > 2 else None

    world = Large()
    assert await search(world, shard(4, 2)) == {}
    assert max(Counter(world.runs).values()) == 1


async def test_the_search_ends_with_as_many_culprits_as_were_asked_for() -> None:
    world = World("g1s0", "g3s0", "g5s0")
    assert list(await search(world, shard(8, 2), most=2)) == ["g1s0", "g3s0"]
    assert not any("g4s0" in run and len(run) < 8 for run in world.runs)


async def test_where_every_sample_fails_it_is_the_module() -> None:
    world = World(*(name for group in shard(8, 2) for name in group))
    with pytest.raises(PoolError, match=r"shard 0: each sample .*\(g0s0, g1s0\).* module 'policy'"):
        await search(world, shard(8, 2))
    assert len(world.runs) < 12
