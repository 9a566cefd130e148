from __future__ import annotations

import asyncio
import pickle

import pytest

from rlhf_flows.data import ShardHandle, StreamDataset
from rlhf_flows.errors import DataError, ReplicaDiedError, WaitTimeoutError


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


async def test_a_shard_that_comes_twice_is_taken_once() -> None:
    stream = StreamDataset(2)
    assert stream.append(handle(0))
    assert not stream.append(handle(0))
    assert stream.num_arrived == 1
    assert stream.missing == (1,)


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
        match=r"scoring of episode 1: shards 5, 6 are waited for, and no shard came for 0\.01 s",
    ):
        await stream.wait_for([4, 5, 6], timeout_s=0.01)
    with pytest.raises(WaitTimeoutError, match="9, 10 and 9 more are"):
        await stream.wait_for(range(20), timeout_s=0.01)
    with pytest.raises(DataError, match="shard 20 was asked for"):
        await stream.wait_for([20], timeout_s=0.01)


async def test_a_wait_goes_on_for_as_long_as_shards_come() -> None:
    stream = StreamDataset(10)
    waiting = asyncio.create_task(stream.wait_for([9], timeout_s=0.1))
    for index in range(10):
        await asyncio.sleep(0.04)
        assert not waiting.done()
        stream.append(handle(index))
    assert await waiting == [handle(9)]


async def test_a_stream_that_failed_by_a_timeout_of_its_own_says_so() -> None:
    stream = StreamDataset(1)
    stream.fail(TimeoutError("the store did not answer"))
    with pytest.raises(TimeoutError, match="the store did not answer"):
        await stream.wait_for([0], timeout_s=5)


def test_a_shard_that_has_not_arrived_is_named() -> None:
    stream = StreamDataset(2)
    stream.append(handle(1))
    with pytest.raises(DataError, match="shard 0 has not arrived"):
        stream[0]
    assert stream[1].key == "shard-1"


def test_handles_cross_processes() -> None:
    assert pickle.loads(pickle.dumps(handle(3))) == handle(3)
