"""Pools on a real Ray head: found again, rebuilt, repaired, released."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from torch import nn

from rlhf_flows.errors import (
    FencedError,
    NoAnswerError,
    NotBegunError,
    PoolError,
    ReplicaDiedError,
    ShardError,
    WaitTimeoutError,
)
from rlhf_flows.modules import BaseModule, TorchModule
from rlhf_flows.pools import Pool
from rlhf_flows.pools.actors import namespace_of
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.pools.transport import pack
from rlhf_flows.store import check_fence, open_store, take_attempt
from tests.incidents import Incidents
from tests.pools.specs import ROWS, manifest_of, rollout_call, spec_of, train_call
from tests.toys import ToyPolicy

pytestmark = pytest.mark.usefixtures("ray_head")

MakePool = Callable[..., Pool]


class Plain(BaseModule):
    """Says who it is, sleeps, or raises, as asked."""

    default_threads = 1

    def setup(self) -> None:
        pass

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return {}


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[MakePool]:
    """Pools of one run of this test; all are released at its end."""
    pools: list[Pool] = []
    run = f"run-{uuid4().hex[:8]}"

    def make(
        module: BaseModule,
        *,
        attempt: int = 1,
        max_restarts: int = 3,
        check_fence: Callable[[], None] | None = None,
        **spec: Any,
    ) -> Pool:
        pool = Pool(
            spec=spec_of(module, tmp_path, **{"run": run, **spec}),
            attempt=attempt,
            setup_timeout_s=60.0,
            max_restarts=max_restarts,
            check_fence=check_fence,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        with contextlib.suppress(FencedError):
            pool.release()


def pids(pool: Pool) -> list[int]:
    return [r.state.pid for r in pool.replicas]


def actors_of(pool: Pool) -> list[str]:
    import ray

    return sorted(
        a["name"]
        for a in ray.util.list_named_actors(all_namespaces=True)
        if a["namespace"] == namespace_of(pool.spec.run)
    )


async def loaded(pool: Pool) -> Pool:
    await pool.open()
    await pool.set_dataset("train", "digest", ROWS)
    return pool


async def gone(pid: int) -> None:
    for _ in range(100):
        if not psutil.pid_exists(pid):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"process {pid} lives")


# ---- found again, or not ----------------------------------------------------------------------


@pytest.mark.slow
async def test_a_second_pool_object_finds_the_same_processes(make_pool: MakePool) -> None:
    first = make_pool(Plain("plain"), num_replica=2)
    await first.open()
    second = make_pool(Plain("plain"), num_replica=2, attempt=2)
    await second.open()
    assert pids(second) == pids(first)
    assert [r.reattached for r in (*first.replicas, *second.replicas)] == [False] * 2 + [True] * 2

    # The older one is fenced by now, and its failure ends nothing.
    with pytest.raises(FencedError, match=r"attempt 1 .* was taken over by attempt 2"):
        await make_pool(Plain("plain"), num_replica=2, attempt=1).open()
    with pytest.raises(FencedError):
        await first.call("attach", 1, what="a zombie's call", timeout_s=20)
    state = await second.call("state", what="its state", timeout_s=20)
    assert state.pid == pids(second)[0]

    # A replica too many is ended; another making is built anew.
    fewer = make_pool(Plain("plain"), num_replica=1, attempt=3)
    await fewer.open()
    assert pids(fewer) == pids(first)[:1]
    await gone(pids(first)[1])
    assert actors_of(fewer) == ["plain/0/0"]
    other = make_pool(Plain("plain"), num_replica=1, attempt=4, digest="another making")
    await other.open()
    assert not other.replicas[0].reattached
    assert pids(other) != pids(fewer)

    other.release()
    await gone(pids(fewer)[0])
    assert actors_of(other) == []


async def test_a_zombie_starts_no_process_where_a_newer_attempt_rules(
    make_pool: MakePool, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    pool = make_pool(Plain("plain"), check_fence=lambda: check_fence(store, pool.spec.run, 1))
    for _ in range(2):
        take_attempt(store, pool.spec.run, flow_run_id=None, changed={})
    with pytest.raises(FencedError, match="replaced by attempt 2"):
        await pool.open()
    assert actors_of(pool) == []


async def test_a_zombie_releases_nothing_of_a_newer_attempt(
    make_pool: MakePool, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    pool = make_pool(Plain("plain"), check_fence=lambda: check_fence(store, pool.spec.run, 1))
    take_attempt(store, pool.spec.run, flow_run_id=None, changed={})
    await pool.open()
    newer = make_pool(Plain("plain"), attempt=2)
    await newer.open()
    take_attempt(store, pool.spec.run, flow_run_id=None, changed={})
    with pytest.raises(FencedError, match="replaced by attempt 2"):
        pool.release()
    assert (await newer.call("state", what="its state", timeout_s=20)).pid == pids(pool)[0]


class FailsToStart(Plain):
    def setup(self) -> None:
        raise OSError("no such model")


class DiesAtStart(Plain):
    def setup(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
async def test_a_pool_that_does_not_come_up_says_why_and_leaves_nothing(
    make_pool: MakePool,
) -> None:
    failing = make_pool(FailsToStart("plain"))
    with pytest.raises(OSError, match="no such model"):
        await failing.open()
    dying = make_pool(DiesAtStart("dying"))
    with pytest.raises(PoolError, match="of replica 0 died 3 times while it loaded its model"):
        await dying.open()
    for _ in range(50):
        if not actors_of(dying):
            break
        await asyncio.sleep(0.1)
    assert actors_of(dying) == []


class CannotBeMade(Plain):
    """As one whose package is missing where the worker runs."""

    def __setstate__(self, state: Any) -> None:
        raise ModuleNotFoundError("No module named 'judge'")


async def test_a_module_that_cannot_be_made_over_there_says_so(make_pool: MakePool) -> None:
    with pytest.raises(PoolError, match=r"'plain' cannot be made on .*No module named 'judge'"):
        await make_pool(CannotBeMade("plain")).open()


class DiesOnceAtStart(Plain):
    def __init__(self, name: str, kill: Path) -> None:
        super().__init__(name)
        self.kill = kill

    def setup(self) -> None:
        if self.kill.exists():
            self.kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


async def test_a_replica_that_is_killed_while_it_loads_is_started_again(
    make_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "kill").touch()
    pool = make_pool(DiesOnceAtStart("once", tmp_path / "kill"))
    await pool.open()
    assert pool.replicas[0].state.ready
    assert not (tmp_path / "kill").exists()


# ---- repaired ---------------------------------------------------------------------------------


class Killable(ToyPolicy):
    """Dies in the first call after `kill` was written, before it has done anything."""

    def __init__(self, name: str, kill: Path) -> None:
        super().__init__(name)
        self.kill = kill

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        if self.kill.exists():
            self.kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward_step(data, iteration)


async def test_a_dead_replica_is_replaced_and_holds_its_version_before_it_works(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(Killable("policy", tmp_path / "kill"))
    brought: list[tuple[int, int]] = []

    async def bring_to(_: Pool, replica: Any, version: int) -> None:
        weights = {"preferences": torch.arange(10.0) * version}
        (bucket,) = pack(weights.items(), manifest_of(weights, version, 1 << 20))
        replica.state = await pool.on_replica(
            replica, "receive_bucket", 1, bucket, what="weights", timeout_s=20
        )
        brought.append((replica.state.pid, version))

    pool.bring_to = bring_to
    await pool.open()
    await pool.set_dataset("train", "digest", ROWS)
    (tmp_path / "kill").touch()

    async def shard(index: int) -> Any:
        call = rollout_call(0, index, version=3)
        call = replace(call, commit_key=None)
        what = f"shard {index} of rollout"
        answer = await pool.call("forward", call, what=what, timeout_s=30, version=3, num_returns=3)
        return answer[2]

    with pytest.raises(ReplicaDiedError, match=r"replica 0 of pool 'policy' died during shard 0 o"):
        await shard(0)
    report = await shard(0)
    assert report.rows == 8
    old, new = brought
    assert (old[1], new[1]) == (3, 3)
    assert old[0] != new[0]
    assert pool.replicas[0].version == 3
    weights = await pool.call("weights_digests", 1, what="digest", timeout_s=20)
    assert weights == {"": digest_weights([("preferences", torch.arange(10.0) * 3)])}


@pytest.mark.slow
async def test_a_replica_that_dies_again_and_again_fails_its_pool_one_that_works_does_not(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(Killable("policy", tmp_path / "kill"), max_restarts=1)
    await pool.open()
    await pool.set_dataset("train", "digest", ROWS)

    async def shard(what: str, *, dies: bool, suspect: bool = False) -> None:
        call = replace(rollout_call(0, 0), commit_key=None)
        if dies:
            (tmp_path / "kill").touch()
        with pytest.raises(ReplicaDiedError) if dies else contextlib.nullcontext():
            await pool.call(
                "forward", call, what=what, timeout_s=30, num_returns=3, suspect=suspect
            )

    await shard("a shard", dies=True)
    await shard("a shard", dies=False)
    await shard("another", dies=True)
    await shard("a part of it", dies=True, suspect=True)  # put down to a sample
    await shard("another", dies=True)
    with pytest.raises(PoolError, match=r"replica 0 died 2 times without finishing anything in"):
        await shard("the rest", dies=False)


async def test_a_death_while_idle_is_not_put_down_to_the_work_that_comes_next(
    make_pool: MakePool,
) -> None:
    pool = make_pool(Plain("plain"), max_restarts=0)
    await pool.open()
    os.kill(pids(pool)[0], signal.SIGKILL)
    await gone(pids(pool)[0])
    await asyncio.sleep(1.1)
    before = pids(pool)
    assert (await pool.call("state", what="a look", timeout_s=60)).pid != before[0]


async def test_what_needs_what_a_replica_holds_is_not_begun_on_another_in_its_place(
    make_pool: MakePool,
) -> None:
    pool = make_pool(Plain("plain"))
    await pool.open()
    before = pids(pool)[0]
    os.kill(before, signal.SIGKILL)
    await gone(before)
    await asyncio.sleep(1.1)
    with pytest.raises(NotBegunError, match=r"a step was not begun: replica 0 .* died, and what"):
        await pool.call("state", what="a step", timeout_s=60, as_held=True)
    assert not pool.replicas[0].alive
    assert (await pool.call("state", what="a look", timeout_s=60)).pid != before


async def test_some_calls_are_answered_beside_the_work_and_by_who_does_it(
    make_pool: MakePool,
) -> None:
    pool = await loaded(make_pool(Slow("slow"), works_beside=True))
    (replica,) = pool.replicas
    call = replace(rollout_call(0, 0), version=None, commit_key=None)
    working = asyncio.create_task(
        pool.call("forward", call, what="a shard", timeout_s=60, num_returns=3)
    )
    while not replica.working_on:
        await asyncio.sleep(0.01)
    (state,) = await pool.beside(replica, "state", what="a look", timeout_s=20)
    assert state.pid == pids(pool)[0]
    assert not working.done()
    beside = asyncio.create_task(
        pool.beside(replica, "forward", call, what="an upload", timeout_s=60)
    )
    await asyncio.sleep(0.5)
    os.kill(state.pid, signal.SIGKILL)
    with pytest.raises(ReplicaDiedError, match="died during an upload"):
        await beside
    with pytest.raises(ReplicaDiedError, match="died during a shard"):
        await working
    assert not replica.alive
    assert replica.deaths == 1


@pytest.mark.slow
async def test_work_that_nobody_waits_for_any_more_is_not_taken_for_the_next(
    make_pool: MakePool,
) -> None:
    pool = await loaded(make_pool(ToyPolicy("policy", slow_s=1.5)))
    call = replace(rollout_call(0, 0), commit_key=None)

    async def shard(timeout_s: float, wait_s: float) -> Any:
        what = "shard 0"
        return await pool.call(
            "forward", call, what=what, timeout_s=timeout_s, wait_s=wait_s, num_returns=3
        )

    await shard(30, 30)
    pid = pids(pool)[0]
    cancelled = asyncio.create_task(shard(30, 30))
    await asyncio.sleep(0.3)
    cancelled.cancel()
    # The time for its own work begins when the other's is through.
    await shard(2.5, 30)
    assert pids(pool) == [pid]
    # One that does not get through is replaced: nobody knows when it will.
    stuck = asyncio.create_task(shard(30, 30))
    await asyncio.sleep(0.3)
    stuck.cancel()
    os.kill(pid, signal.SIGSTOP)
    await shard(30, 2.0)
    assert pids(pool) != [pid]


class Slow(Plain):
    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        time.sleep(60)
        return {}

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        from tests.toys import Rows

        return Rows(prompts)


@pytest.mark.slow
async def test_waits_end_and_name_what_they_waited_for(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlhf_flows.pools.pool._SAY_AT_MOST_EACH_S", 0.5)
    pool = await loaded(make_pool(Slow("slow")))
    heard = Incidents()
    pool.on_incident = heard.by_pool
    call = replace(rollout_call(0, 0), version=None, commit_key=None)
    pid = pids(pool)[0]
    working = asyncio.create_task(
        pool.call("forward", call, what="shard 0 of rollout", timeout_s=2, num_returns=3)
    )
    while not pool.replicas[0].working_on:
        await asyncio.sleep(0.01)
    with pytest.raises(NotBegunError) as waited:
        await pool.call("state", what="shard 1 of rollout", timeout_s=1.2)
    assert "shard 1 of rollout waited 1.2 s for a free replica of pool 'slow'" in str(waited.value)
    assert "replica 0 works on shard 0 of rollout since" in str(waited.value)
    with pytest.raises(NoAnswerError, match=r"waited 2 s for shard 0 of rollout on replica 0"):
        await working
    # What it did is unknown: only a new process is known to be idle.
    await gone(pid)
    state = await pool.call("state", what="a look", timeout_s=60)
    assert state.pid != pid

    # Who keeps it waiting was said meanwhile: by the pool, not by each call that waits.
    said = [r.getMessage() for r in caplog.records if "is waited for" in r.getMessage()]
    assert 2 <= len(said) <= 4
    assert "replica 0 works on shard 0 of rollout since" in said[0]
    assert f"(actor slow/0/0, process {pid} on " in said[0]
    assert len(heard.of("stall")) == len(said)
    assert [f["replica"] for f in heard.of("actor-restart")] == [0]


@pytest.mark.slow
async def test_a_queue_that_moves_is_no_reason_to_give_up(make_pool: MakePool) -> None:
    pool = await loaded(make_pool(ToyPolicy("policy", slow_s=0.6)))

    async def shard(index: int) -> Any:
        call = replace(rollout_call(0, 0), commit_key=None)
        return await pool.call(
            "forward", call, what=f"shard {index}", timeout_s=20, wait_s=3.0, num_returns=3
        )

    await asyncio.gather(*(shard(i) for i in range(7)))


async def test_what_a_module_waited_for_in_vain_does_not_end_its_replica(
    make_pool: MakePool,
) -> None:
    class Patient(Slow):
        def forward_step(self, data: Any, iteration: int = 0) -> Any:
            raise WaitTimeoutError("the judge did not answer")

    pool = await loaded(make_pool(Patient("patient")))
    call = replace(rollout_call(0, 0), version=None, commit_key=None)
    with pytest.raises(WaitTimeoutError, match="the judge did not answer") as raised:
        await pool.call("forward", call, what="shard 0", timeout_s=20, num_returns=3)
    assert not isinstance(raised.value, NoAnswerError)
    assert pool.replicas[0].alive


async def test_what_user_code_raises_reaches_the_caller_as_it_is(make_pool: MakePool) -> None:
    class Raises(Slow):
        def forward_step(self, data: Any, iteration: int = 0) -> Any:
            raise TimeoutError("the judge did not answer")

    pool = await loaded(make_pool(Raises("raises")))
    call = replace(rollout_call(0, 0), version=None, commit_key=None)
    with pytest.raises(ShardError, match="TimeoutError: the judge did not answer"):
        await pool.call("forward", call, what="shard 0", timeout_s=20, num_returns=3)
    assert pool.replicas[0].alive


@pytest.mark.slow
async def test_a_pool_without_heartbeat_releases_itself(make_pool: MakePool) -> None:
    pool = make_pool(Plain("plain"), lease_s=3.0)
    await pool.open()
    for _ in range(8):  # kept by heartbeats
        await pool.heartbeat()
        await asyncio.sleep(0.6)
    assert psutil.pid_exists(pids(pool)[0])
    await gone(pids(pool)[0])


# ---- groups of ranks --------------------------------------------------------------------------


class TwoRanks(TorchModule):
    """Data-parallel: each rank takes its half of the batch, gradients are summed."""

    default_threads = 1

    def setup(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def train_step(self, data: Any, iteration: int) -> Any:
        x = data[0]["x"][self.rank :: self.world_size]  # [B / ranks]
        self.optimizer.zero_grad()
        loss = (self.model(x[:, None]) * x[:, None]).sum() / 8
        loss.backward()
        (total,) = self.sum_gradients(loss.detach()[None]).tolist()
        self.optimizer.step()
        return {"loss": total, "weight": float(self.model.weight.detach())}


@pytest.mark.slow
async def test_ranks_of_a_replica_work_as_one_and_die_as_one(
    make_pool: MakePool, tmp_path: Path
) -> None:
    import ray

    from rlhf_flows.data import to_arrow

    pool = make_pool(TwoRanks("trainer"), ranks_per_replica=2)
    await pool.open()
    assert actors_of(pool) == ["trainer/0/0", "trainer/0/1"]
    x = torch.arange(8.0)
    table = ray.put(to_arrow({"x": x}))
    call = train_call(0, 0, num_updates=1)
    metrics = await pool.call("train", call, table, what="a step", timeout_s=30)
    assert metrics["weight"] == pytest.approx(-float((x * x).sum() / 8))
    record = await pool.call("checkpoint", 1, 1, True, what="a checkpoint", timeout_s=30)
    folders = [f for f in tmp_path.rglob("version=000001/*") if f.is_dir()]
    assert sorted(str(f.relative_to(tmp_path)) for f in folders) == sorted(
        [record.weights.prefix, record.state.prefix]
    )

    (replica,) = pool.replicas
    second = await replica.ranks[1].state.remote()
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(ReplicaDiedError):
        await pool.call("restore", 1, record, 1, what="a restore", timeout_s=30)
    await pool.call("restore", 1, record, 1, what="a restore", timeout_s=30)
    digests = [await rank.weights_digests.remote(1) for rank in pool.replicas[0].ranks]
    assert digests == [record.digests] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
async def test_what_is_left_of_a_group_makes_room_for_a_whole_one(
    make_pool: MakePool, dead: int
) -> None:
    before = make_pool(TwoRanks("trainer"), ranks_per_replica=2)
    await before.open()
    states = [await rank.state.remote() for rank in before.replicas[0].ranks]
    os.kill(states[dead].pid, signal.SIGKILL)
    await gone(states[dead].pid)
    while len(actors_of(before)) > 1:
        await asyncio.sleep(0.05)
    after = make_pool(TwoRanks("trainer"), ranks_per_replica=2, attempt=2)
    await after.open()
    await gone(states[1 - dead].pid)
    assert actors_of(after) == ["trainer/0/0", "trainer/0/1"]
