from __future__ import annotations

import asyncio
import pickle

import pytest
import torch

from rlhf_flows.data import (
    ShardHandle,
    StreamDataset,
    to_parquet,
)
from rlhf_flows.errors import (
    DataDamageError,
    DataError,
    ObjectNotFoundError,
    ReplicaDiedError,
    WaitTimeoutError,
)

from .strategies import bits


def handle(index: int, key: str | None = None) -> ShardHandle:
    return ShardHandle(index=index, key=key or f"shard-{index}", rows=2)


async def indices(stream: StreamDataset) -> list[int]:
    return [shard.index async for shard in stream]


async def test_readers_see_every_shard_in_order_of_arrival_while_the_stream_grows() -> None:
    stream = StreamDataset(3)
    stream.append(handle(2))
    early, late = asyncio.create_task(indices(stream)), asyncio.create_task(indices(stream))
    await asyncio.sleep(0)
    stream.append(handle(0))
    await asyncio.sleep(0)
    assert not early.done()
    stream.append(handle(1))
    assert await early == await late == await indices(stream) == [2, 0, 1]
    assert [shard.index for shard in stream] == [0, 1, 2]


async def test_a_shard_that_comes_twice_is_taken_once() -> None:
    stream = StreamDataset(2)
    assert stream.append(handle(0))
    assert not stream.append(handle(0))
    assert stream.num_arrived == 1
    assert stream.missing == (1,)
    assert not stream.complete


def test_two_objects_for_one_shard_are_refused() -> None:
    stream = StreamDataset(2, name="rollout of episode 3")
    stream.append(handle(0))
    with pytest.raises(DataError, match="rollout of episode 3: shard 0 is shard-0 already"):
        stream.append(handle(0, "other"))
    with pytest.raises(DataError, match="the plan has shards 0 to 1"):
        stream.append(handle(2))


async def test_a_failure_reaches_readers_after_what_had_arrived() -> None:
    stream = StreamDataset(3)
    stream.append(handle(1))
    seen = []

    async def read() -> None:
        async for shard in stream:
            seen.append(shard.index)

    reader = asyncio.create_task(read())
    waiter = asyncio.create_task(stream.wait_for([0], timeout_s=5))
    await asyncio.sleep(0)
    stream.fail(ReplicaDiedError("gone"))
    stream.fail(ValueError("too late to count"))
    for task in (reader, waiter):
        with pytest.raises(ReplicaDiedError, match="gone"):
            await task
    assert seen == [1]
    assert await stream.wait_for([1], timeout_s=5) == [handle(1)]
    with pytest.raises(ReplicaDiedError):
        iter(stream)


async def test_wait_for_returns_the_shards_asked_as_soon_as_they_are_there() -> None:
    stream = StreamDataset(3)
    waiting = asyncio.create_task(stream.wait_for([2, 0], timeout_s=5))
    for index in (0, 2):
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.append(handle(index))
    assert [shard.index for shard in await waiting] == [2, 0]


async def test_a_wait_that_ends_names_the_shards_it_waited_for() -> None:
    stream = StreamDataset(20, name="scoring of episode 1")
    stream.append(handle(4))
    with pytest.raises(
        WaitTimeoutError,
        match=r"scoring of episode 1: waited 0\.01 s for shards 5, 6; 1 of 20 have arrived",
    ):
        await stream.wait_for([4, 5, 6], timeout_s=0.01)
    with pytest.raises(WaitTimeoutError, match="9, 10 and 9 more; 1 of 20"):
        await stream.wait_for(range(20), timeout_s=0.01)
    with pytest.raises(DataError, match="shard 20 was asked for"):
        await stream.wait_for([20], timeout_s=0.01)


async def test_a_stream_that_failed_by_a_timeout_of_its_own_says_so() -> None:
    stream = StreamDataset(1)
    stream.fail(TimeoutError("the store did not answer"))
    with pytest.raises(TimeoutError, match="the store did not answer"):
        await stream.wait_for([0], timeout_s=5)


def test_an_unfinished_stream_cannot_be_iterated_without_waiting() -> None:
    stream = StreamDataset(2)
    stream.append(handle(1))
    with pytest.raises(DataError, match="shards 0 have not arrived"):
        list(stream)
    with pytest.raises(DataError, match="shard 0 has not arrived"):
        stream[0]
    assert stream[1].key == "shard-1"


class Kept:
    """The objects of a store, in memory."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFoundError(key)
        return self.objects[key]


def test_a_stream_rebuilt_from_keys_reads_its_batches_by_index() -> None:
    batches = [{"x": torch.tensor([float(i)]), "s": [f"s{i}"]} for i in range(3)]
    store = Kept({f"k{i}": to_parquet(batch) for i, batch in enumerate(batches)})
    stream = StreamDataset.rebuild({2: "k2", 0: "k0", 1: "k1"}, num_shards=3)
    assert stream.complete
    assert bits(list(stream.read(store))) == bits(batches)
    assert bits(list(stream.read(store, columns=["s"]))) == bits([{"s": b["s"]} for b in batches])


def test_a_damaged_shard_is_named_with_its_key() -> None:
    store = Kept({"k0": to_parquet({"x": [1]})[:-1]})
    with pytest.raises(DataDamageError, match=r"shard 0 \(k0\)"):
        list(StreamDataset.rebuild({0: "k0"}, num_shards=1).read(store))


def test_handles_cross_processes() -> None:
    assert pickle.loads(pickle.dumps(handle(3))) == handle(3)
