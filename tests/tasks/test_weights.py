"""Weights from a trainer to its followers on a real Ray head: all of them, or a named error."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import NoAnswerError, ReplicaDiedError
from rlhf_flows.modules import BaseModule
from rlhf_flows.pools import NO_VERSION, Pool
from rlhf_flows.store import open_store
from rlhf_flows.tasks.weights import RunWeights, SyncPair
from tests.incidents import Incidents
from tests.pools.specs import RUN, spec_of
from tests.tasks.sync_toys import TENSOR_BYTES, Follower, HalvedTrainer, SlowFollower, tell

pytestmark = pytest.mark.usefixtures("ray_head")

BUCKET_BYTES = 2 * TENSOR_BYTES


class World:
    """A trainer that holds version 1, and two replicas of a module that follows it."""

    def __init__(self, folder: Path, timeout_s: float, num_tensors: int) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.pools: dict[str, Pool] = {}
        self.num_tensors = num_tensors
        self.sent: list[str] = []
        self.heard = Incidents()

    def add(self, module: BaseModule, **spec: Any) -> Pool:
        pool = Pool(
            spec=spec_of(module, self.folder / "store", **spec),
            attempt=1,
            setup_timeout_s=60,
            max_restarts=3,
            on_incident=self.heard.by_pool,
        )
        self.pools[module.name] = pool
        return pool

    async def open(self, *followers: tuple[BaseModule, int], ranks: int) -> None:
        made = {"folder": self.folder, "num_tensors": self.num_tensors}
        self.trainer = self.add(HalvedTrainer("trainer", **made), ranks_per_replica=ranks)
        for module, replicas in followers or [(Follower("policy", **made), 2)]:
            self.add(module, num_replica=replicas)
        await asyncio.gather(*(pool.open() for pool in self.pools.values()))
        record = await self.trainer.call("checkpoint", 1, 1, False, what="a save", timeout_s=30)
        (replica,) = self.trainer.replicas
        replica.state = await self.trainer.call("restore", 1, record, 1, what="it", timeout_s=30)
        assert replica.version == 1
        # As after a commit: what is sent is not digested before.
        await self.trainer.call("weights_digests", 1, what="digests", timeout_s=30)
        runtime = {"sync_timeout_s": self.timeout_s, "sync_bucket_bytes": BUCKET_BYTES}
        self.weights = RunWeights(
            config=EngineConfig.model_validate({"runtime": runtime}),
            run=RUN,
            attempt=1,
            store=open_store(self.folder / "store"),
            pools=self.pools,
            trained=frozenset({"trainer"}),
            syncs=[SyncPair(source="trainer", target=name) for name in self.followers],
            deleted=(),
        )
        self.weights.commits[1] = {"checkpoints": {"trainer": record.to_json()}}
        self.digest = record.digest

    @property
    def followers(self) -> list[str]:
        return [name for name in self.pools if name != "trainer"]

    async def sync(self) -> None:
        """As the task does it, at its first try and at later ones."""
        every = [(self.pools[n], r) for n in self.followers for r in self.pools[n].replicas]
        for pool, replica in every:
            if not replica.alive:
                await pool.rebuild(replica)
        behind = [(pool, replica) for pool, replica in every if replica.version != 1]
        await self.weights.bring_all(self.weights.pair_of(self.followers[0]), behind, 1)

    def held(self) -> list[int]:
        """By the replicas that may be given work."""
        replicas = [r for n in self.followers for r in self.pools[n].replicas]
        return [r.version for r in replicas if r.alive]

    async def digests(self) -> list[str]:
        found = []
        for name in self.followers:
            what = "digests"
            for each in await self.pools[name].broadcast(
                "weights_digests", 1, what=what, timeout_s=30
            ):
                found.append(each[""])
        return found

    async def check_all_hold_it(self) -> None:
        assert set(self.held()) == {1}
        assert set(await self.digests()) == {self.digest}


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    options = getattr(request, "param", {})
    made = World(tmp_path, options.get("timeout_s", 20.0), options.get("num_tensors", 12))
    yield made
    for pool in made.pools.values():
        pool.release()


# ---- any to any -------------------------------------------------------------------------------


@pytest.mark.slow
async def test_halves_of_two_ranks_reach_three_replicas_of_two_modules_by_one_stream(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    made = {"folder": world.folder, "num_tensors": world.num_tensors}
    followers = (Follower("policy", **made), 2), (Follower("reference", **made), 1)
    await world.open(*followers, ranks=2)
    pids = [r.state.pid for name in world.followers for r in world.pools[name].replicas]
    await world.sync()
    await world.check_all_hold_it()
    assert pids == [r.state.pid for name in world.followers for r in world.pools[name].replicas]
    assert not caplog.records  # none took the way through the store


async def test_a_trainer_that_has_moved_on_sends_nothing(world: World) -> None:
    await world.open(ranks=1)
    record = await world.weights.checkpoint_of("trainer", 1)
    await world.trainer.call("restore", 1, record, 2, what="another version", timeout_s=30)
    await world.sync()  # by the store
    await world.check_all_hold_it()


# ---- what fails -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_of_the_trainer_dies_in_the_middle(world: World, rank: int) -> None:
    await world.open(ranks=2)
    tell(world.folder, f"trainer/0/{rank}", "die")
    with pytest.raises(
        ReplicaDiedError,
        match=r"replica 0 of pool 'trainer' died during the weights of version 1 for 'policy'",
    ):
        await world.sync()
    assert world.held() == []
    await world.sync()
    await world.check_all_hold_it()


@pytest.mark.slow
async def test_a_receiver_dies_in_the_middle_and_the_other_goes_on(world: World) -> None:
    await world.open(ranks=1)
    tell(world.folder, "policy/1/0", "die")
    with pytest.raises(
        ReplicaDiedError,
        match=r"replica 1 of pool 'policy' died during loading the weights of version 1",
    ):
        await world.sync()
    assert world.held() == [1]
    await world.sync()
    await world.check_all_hold_it()


@pytest.mark.slow
async def test_bytes_that_are_not_the_committed_ones_reach_no_model(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.open(ranks=1)
    tell(world.folder, "trainer/0/0", "corrupt")
    before = [r.state.pid for r in world.pools["policy"].replicas]
    await world.sync()
    await world.check_all_hold_it()
    said = [r.getMessage() for r in caplog.records]
    assert len([s for s in said if "layer_006 of version 1 arrived with other bytes" in s]) == 2
    assert [f["replica"] for f in world.heard.of("sync-fallback")] == [0, 1]
    assert not set(before) & {r.state.pid for r in world.pools["policy"].replicas}


@pytest.mark.slow
async def test_a_receiver_that_fails_is_replaced_and_the_other_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.open(ranks=1)
    tell(world.folder, "policy/0/0", "raise")
    before = [r.state.pid for r in world.pools["policy"].replicas]
    await world.sync()
    await world.check_all_hold_it()
    after = [r.state.pid for r in world.pools["policy"].replicas]
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    assert any("ValueError: no more of this" in r.getMessage() for r in caplog.records)


@pytest.mark.slow
async def test_a_trainer_that_raises_is_named_and_the_store_has_them_too(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.open(ranks=1)
    tell(world.folder, "trainer/0/0", "raise")
    await world.sync()
    await world.check_all_hold_it()
    assert any(
        "'trainer' failed while it gave its weights of version 1 (ValueError" in r.getMessage()
        for r in caplog.records
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [{"timeout_s": 4.0}], indirect=True)
async def test_a_slow_trainer_is_an_error_in_time_and_is_left_to_finish(world: World) -> None:
    await world.open(ranks=2)
    pid = world.trainer.replicas[0].state.pid
    tell(world.folder, "trainer/0/1", "sleep 9")
    started = time.monotonic()
    with pytest.raises(
        NoAnswerError,
        match=r"waited for the weights of version 1 for 'policy' since \d\.\d s, and for number \d",
    ):
        await world.sync()
    assert time.monotonic() - started < 6
    assert world.held() == []
    await world.sync()
    await world.check_all_hold_it()
    state = await world.trainer.call("state", what="a look", timeout_s=20)
    assert state.pid == pid
    assert state.version == 1


@pytest.mark.slow
@pytest.mark.parametrize("world", [{"timeout_s": 4.0}], indirect=True)
async def test_a_slow_receiver_is_an_error_in_time(world: World) -> None:
    await world.open(ranks=1)
    tell(world.folder, "policy/1/0", "sleep 30")
    started = time.monotonic()
    with pytest.raises(
        NoAnswerError,
        match=r"waited .* s for loading the weights of version 1 on replica 1 of pool 'policy'",
    ):
        await world.sync()
    assert time.monotonic() - started < 6
    assert NO_VERSION not in world.held()
    await world.sync()
    await world.check_all_hold_it()


async def test_a_stream_that_nobody_takes_further_runs_to_its_end(world: World) -> None:
    await world.open(ranks=2)
    args = (1, 1, BUCKET_BYTES, "", world.digest)
    stream = world.trainer.stream("stream_weights", *args, what="weights", timeout_s=20)
    async with contextlib.aclosing(stream):
        async for _ in stream:
            break
    assert world.trainer.replicas[0].unanswered
    state = await world.trainer.call("state", what="a look", timeout_s=20)
    assert state.version == 1
    await world.sync()
    await world.check_all_hold_it()


# ---- memory -----------------------------------------------------------------------------------


class _Usage:
    """The most that Ray's object store held while it was watched, in bytes."""

    def __init__(self) -> None:
        import ray

        (node,) = (n for n in ray.nodes() if n["Alive"])
        self._address = node["NodeManagerAddress"], node["NodeManagerPort"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.most = self._now()
        self.samples = 0

    def _now(self) -> int:
        from ray._private.internal_api import node_stats

        return int(node_stats(*self._address, False).store_stats.object_store_bytes_used)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, self._now())
            self.samples += 1

    def __enter__(self) -> _Usage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("world", [{"num_tensors": 640}], indirect=True)
async def test_no_more_than_two_buckets_are_on_their_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 buckets of 1 MiB."""
    monkeypatch.setattr("tests.tasks.test_weights.BUCKET_BYTES", 16 * TENSOR_BYTES)
    made = {"folder": world.folder, "num_tensors": world.num_tensors}
    await world.open((SlowFollower("policy", **made), 2), ranks=1)
    bucket = 16 * TENSOR_BYTES
    with _Usage() as usage:
        await world.sync()
    await world.check_all_hold_it()
    print(f"{(usage.most - usage.before) / bucket:.3f} buckets at most, {usage.samples} samples")
    assert usage.samples > 100
    assert 1.9 * bucket < usage.most - usage.before < 2.1 * bucket
