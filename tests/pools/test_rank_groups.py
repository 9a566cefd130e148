"""Groups of ranks on a real Ray head: one that dies, stops or raises takes all down and up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from torch import nn

from rlhf_flows.data import to_arrow
from rlhf_flows.errors import NoAnswerError, PoolError, ReplicaDiedError, ShardError
from rlhf_flows.modules import TorchModule
from rlhf_flows.pools import Pool
from rlhf_flows.pools.actors import namespace_of
from rlhf_flows.pools.rooms import rooms
from tests.pools.specs import spec_of, train_call

pytestmark = pytest.mark.usefixtures("ray_head")

COLLECTIVE_TIMEOUT_S = 4.0
MakePool = Callable[..., Pool]


class Faulty(TorchModule):
    """Its ranks add up their numbers; one of them meets with what `faults` orders, once."""

    default_threads = 1

    def __init__(self, name: str, *, faults: Path) -> None:
        super().__init__(name)
        self.faults = faults

    def setup(self) -> None:
        torch.distributed.barrier()
        self._reach("loading")
        torch.distributed.barrier()
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def train_step(self, data: Any, iteration: int) -> Any:
        self._reach("before")
        torch.distributed.barrier()
        self._reach("middle")
        found = torch.tensor([float(self.rank)])
        torch.distributed.all_reduce(found)
        self._reach("after")
        return {"sum": float(found)}

    def _reach(self, point: str) -> None:
        for rank in (self.rank, "all"):
            path = self.faults / f"{point}-{rank}"
            if path.exists():
                how = path.read_text()
                if rank != "all":
                    path.unlink()
                if how == "raise":
                    raise KeyError("no such column")
                if how == "hang":
                    time.sleep(3600)
                os.kill(os.getpid(), getattr(signal, how))


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[MakePool]:
    """Pools of one run of this test; all are released at its end."""
    pools: list[Pool] = []
    run = f"run-{uuid4().hex[:8]}"

    def make(ranks: int = 2, *, name: str = "trainer", attempt: int = 1, **spec: Any) -> Pool:
        setup_timeout_s = spec.pop("setup_timeout_s", 60.0)
        spec = {
            "run": run,
            "ranks_per_replica": ranks,
            "collective_timeout_s": COLLECTIVE_TIMEOUT_S,
            **spec,
        }
        pool = Pool(
            spec=spec_of(Faulty(name, faults=tmp_path), tmp_path, **spec),
            attempt=attempt,
            setup_timeout_s=setup_timeout_s,
            max_restarts=3,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.release()


async def step(pool: Pool, *, timeout_s: float = 60) -> float:
    """One step of the first episode, as if nothing had been trained."""
    table = to_arrow({"x": torch.arange(8.0)})
    call = train_call(0, 0)
    metrics = await pool.call("train", call, table, what="a step", timeout_s=timeout_s)
    return float(metrics["sum"])


async def pids(pool: Pool) -> list[int]:
    return [state.pid for state in await asyncio.gather(*_states(pool))]


def _states(pool: Pool) -> list[Any]:
    return [rank.state.remote() for rank in pool.replicas[0].ranks]


def actors_of(pool: Pool) -> list[str]:
    import ray

    return sorted(
        a["name"]
        for a in ray.util.list_named_actors(all_namespaces=True)
        if a["namespace"] == namespace_of(pool.spec.run)
    )


def is_over(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def over(pids: list[int], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not all(map(is_over, pids)):
        assert time.monotonic() < deadline, f"of {pids} some live"
        await asyncio.sleep(0.05)


async def fails(pool: Pool, error: type[Exception], *says: str) -> float:
    """A step that fails so; after how many seconds."""
    started = time.monotonic()
    with pytest.raises(error) as caught:
        await step(pool)
    seconds = time.monotonic() - started
    print(f"after {seconds:.2f} s: {caught.value}")
    for part in says:
        assert part in str(caught.value), caught.value
    return seconds


async def works_anew(pool: Pool, before: list[int]) -> None:
    """The ranks that were are gone, all of them, and the next call has new ones."""
    started = time.monotonic()
    assert await step(pool) == sum(range(len(before)))
    print(f"works again after {time.monotonic() - started:.2f} s")
    assert not set(before) & set(await pids(pool))
    await over(before)


@pytest.mark.parametrize(
    ("ranks", "victim", "point"),
    [
        (2, 1, "middle"),
        pytest.param(2, 1, "before", marks=pytest.mark.long),
        pytest.param(2, 0, "middle", marks=pytest.mark.slow),
        pytest.param(4, 2, "middle", marks=pytest.mark.long),
    ],
)
async def test_a_rank_that_is_killed_is_named_and_takes_its_group_down_and_up(
    make_pool: MakePool, tmp_path: Path, ranks: int, victim: int, point: str
) -> None:
    pool = make_pool(ranks)
    await pool.open()
    before = await pids(pool)
    (tmp_path / f"{point}-{victim}").write_text("SIGKILL")
    named = f"rank {victim} (process {before[victim]}"
    assert await fails(pool, ReplicaDiedError, named, "died") < 5
    await works_anew(pool, before)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
async def test_a_rank_that_stops_in_a_collective_is_named_within_its_timeout(
    make_pool: MakePool, tmp_path: Path, victim: int
) -> None:
    pool = make_pool()
    await pool.open()
    before = await pids(pool)
    (tmp_path / f"middle-{victim}").write_text("SIGSTOP")
    named = f"rank {victim} (process {before[victim]}"
    said = [f"rank {1 - victim} of 2 was in training step 1 of episode 0", named]
    if victim:
        said.append("does not answer; it has been in training step 1 of episode 0 for")
    assert await fails(pool, ReplicaDiedError, *said) < COLLECTIVE_TIMEOUT_S + 8
    await works_anew(pool, before)


@pytest.mark.long  # its processes start twice
async def test_a_rank_that_stopped_while_idle_is_replaced_before_it_is_given_work(
    make_pool: MakePool,
) -> None:
    pool = make_pool()
    await pool.open()
    before = await pids(pool)
    await asyncio.sleep(1.2)  # longer than it is trusted
    os.kill(before[1], signal.SIGSTOP)
    started = time.monotonic()
    await works_anew(pool, before)
    assert time.monotonic() - started < COLLECTIVE_TIMEOUT_S + 30


@pytest.mark.slow  # its processes start twice
async def test_a_rank_that_hangs_outside_of_any_collective_is_named_by_the_line_it_is_at(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool()
    await pool.open()
    (tmp_path / "before-1").write_text("hang")
    await fails(pool, ReplicaDiedError, "rank 1 (process", "test_rank_groups.py (_reach)")


@pytest.mark.slow
async def test_an_error_of_one_rank_is_reported_at_once_and_the_group_is_replaced(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool()
    await pool.open()
    before = await pids(pool)
    (tmp_path / "middle-1").write_text("raise")
    says = "trainer.train_step failed on training of episode 0, step 1: KeyError"
    # Well before its sibling has waited for its time.
    assert await fails(pool, ShardError, says) < COLLECTIVE_TIMEOUT_S
    await over(before)
    (tmp_path / "before-0").write_text("raise")
    await fails(pool, ShardError, says)
    await works_anew(pool, before)
    assert pool.replicas[0].deaths == 0  # errors are none


@pytest.mark.long  # its processes start twice
async def test_an_error_that_every_rank_raises_leaves_the_group_as_it_is(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool()
    await pool.open()
    before = await pids(pool)
    (tmp_path / "middle-all").write_text("raise")
    await fails(pool, ShardError, "KeyError")
    (tmp_path / "middle-all").unlink()
    assert await pids(pool) == before
    what = "the digests"
    assert await pool.call("weights_digests", 1, what=what, timeout_s=30)
    assert await pids(pool) == before


@pytest.mark.long  # its processes start twice
@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1), (4, 2)])
async def test_a_rank_that_is_killed_while_it_loads_has_the_whole_group_start_anew(
    make_pool: MakePool, tmp_path: Path, ranks: int, victim: int
) -> None:
    (tmp_path / f"loading-{victim}").write_text("SIGKILL")
    pool = make_pool(ranks)
    started = time.monotonic()
    await pool.open()
    print(f"{ranks} ranks, one killed, are up after {time.monotonic() - started:.2f} s")
    assert not list(tmp_path.glob("loading-*"))
    assert await step(pool) == sum(range(ranks))
    assert actors_of(pool) == [f"trainer/0/{rank}" for rank in range(ranks)]


@pytest.mark.long  # its processes start twice
async def test_a_rank_that_is_killed_whenever_it_loads_is_named_and_nothing_is_left(
    make_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "loading-all").write_text("SIGKILL")
    pool = make_pool()
    with pytest.raises(PoolError, match=r"died 3 times while it loaded its model \(.*rank \d died"):
        await pool.open()
    await nobody_is_left(pool)


@pytest.mark.long  # its processes start twice
async def test_a_rank_that_stops_while_it_loads_is_named(
    make_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "loading-1").write_text("SIGSTOP")
    pool = make_pool()
    await pool.open()
    assert await step(pool) == 1.0


async def nobody_is_left(pool: Pool) -> None:
    deadline = time.monotonic() + 20
    while actors_of(pool):
        assert time.monotonic() < deadline, actors_of(pool)
        await asyncio.sleep(0.05)


async def test_a_group_that_finds_no_room_says_what_it_asks_for_and_reserves_nothing(
    make_pool: MakePool,
) -> None:
    pool = make_pool(num_cpu=5, setup_timeout_s=4.0)  # and the head has 8
    with pytest.raises(NoAnswerError) as caught:
        await pool.open()
    said = "to start its processes: its 2 ranks ask for 5 CPU each, and the cluster has 8 CPU left"
    assert said in str(caught.value)
    assert not rooms(namespace_of(pool.spec.run))
    assert not actors_of(pool)


@pytest.mark.long  # its processes start twice
async def test_a_group_of_which_a_rank_finds_no_room_is_named_and_ended(
    make_pool: MakePool,
) -> None:
    pool = make_pool(num_cpu=5, is_spread=True, setup_timeout_s=20.0)  # each where there is some
    with pytest.raises(NoAnswerError, match=r"to start its processes: no answer of rank [01]$"):
        await pool.open()
    await nobody_is_left(pool)


@pytest.mark.slow  # three groups, and a lease that ends
async def test_a_group_has_a_room_of_its_own_until_its_pool_or_its_lease_ends(
    make_pool: MakePool, tmp_path: Path
) -> None:
    import ray

    pool = make_pool(num_cpu=2, lease_s=30.0)
    names = namespace_of(pool.spec.run)
    await pool.open()
    assert rooms(names) == {f"{names}/trainer/0"}
    assert ray.available_resources()["CPU"] == 4
    before = await pids(pool)
    (tmp_path / "middle-1").write_text("SIGKILL")
    await fails(pool, ReplicaDiedError, "rank 1")
    await works_anew(pool, before)  # in the same room
    assert rooms(names) == {f"{names}/trainer/0"}
    await over(await pids(pool), within_s=90)  # nobody calls: the lease ends
    deadline = time.monotonic() + 20
    while rooms(names):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    again = make_pool(num_cpu=1)
    await again.open()
    assert rooms(names)
    again.release()
    assert not rooms(names)


@pytest.mark.long  # its processes start twice
async def test_a_group_with_an_odd_rank_is_rebuilt_as_one_by_the_next_attempt(
    make_pool: MakePool,
) -> None:
    before = make_pool()
    await before.open()
    old = await pids(before)
    await before.replicas[0].ranks[1].committed.remote(1, 5)  # as if rank 0 had not come so far
    after = make_pool(attempt=2)
    await after.open()
    await over(old)
    assert not set(old) & set(await pids(after))


@pytest.mark.long  # ten processes on two cores
async def test_groups_that_start_at_once_never_meet_each_other(make_pool: MakePool) -> None:
    pools = [make_pool(name=f"trainer{i}") for i in range(5)]
    await asyncio.gather(*(pool.open() for pool in pools))
    assert await asyncio.gather(*map(step, pools)) == [1.0] * 5
