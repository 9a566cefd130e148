"""What training may begin from, and what becomes of it where that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from rlhf_flows.tasks.ahead import Ahead, VersionLostError


async def soon() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def start(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(work)


async def train(ahead: Ahead, version: int, begun: list[int], until: asyncio.Event) -> None:
    async with ahead.training_from(version):
        begun.append(version)
        await until.wait()


async def test_training_begins_from_what_is_written_and_not_before() -> None:
    ahead, begun, until = Ahead(0), [], asyncio.Event()
    following = start(train(ahead, 1, begun, until))
    await soon()
    assert begun == []
    ahead.write(1)
    await soon()
    assert begun == [1]
    committed = start(ahead.until_committed(1))
    await soon()
    assert not committed.done()
    ahead.commit(1)
    await committed
    until.set()
    await following


async def test_what_began_from_a_lost_version_ends_before_that_is_trained_again() -> None:
    ahead, begun, never = Ahead(3), [], asyncio.Event()
    ahead.write(4)
    following = start(train(ahead, 4, begun, never))
    await soon()
    again = start(train(ahead, 3, begun, never))
    await soon()
    assert begun == [4], "the trainers are in use"
    ahead.lose()
    with pytest.raises(VersionLostError, match="version 4 was lost on its way to the store"):
        await following
    await soon()
    assert begun == [4, 3]
    later = start(train(ahead, 4, begun, never))
    await soon()
    assert begun == [4, 3], "version 4 is not there again"
    for task in (again, later):
        task.cancel()


@pytest.mark.parametrize("arrives", [True, False])
async def test_an_error_waits_for_what_is_on_its_way(arrives: bool) -> None:
    ahead = Ahead(0)
    ahead.write(1)

    async def fail() -> None:
        async with ahead.training_from(1):
            raise ValueError("of the user's code")

    failing = start(fail())
    await soon()
    assert not failing.done()
    if arrives:
        ahead.commit(1)
        with pytest.raises(ValueError, match="of the user's code"):
            await failing
    else:
        # Whatever went wrong, it may be for that reason; and it is to begin again in any case.
        ahead.lose()
        with pytest.raises(VersionLostError):
            await failing


async def test_a_training_that_is_cancelled_waits_for_nothing() -> None:
    ahead, begun = Ahead(0), []
    ahead.write(1)
    following = start(train(ahead, 1, begun, asyncio.Event()))
    await soon()
    following.cancel()
    await soon()
    assert following.cancelled()
    ahead.commit(1)
    async with ahead.training_from(1):
        pass
