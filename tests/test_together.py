"""Coroutines that live and fail together."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from rlhf_flows.together import beside, together


async def fails(error: Exception) -> NoReturn:
    raise error


async def waits(ended: list[str] | None = None) -> NoReturn:
    try:
        await asyncio.sleep(60)
        raise AssertionError("nobody ended it")
    finally:
        if ended is not None:
            ended.append("watch")


async def test_the_first_failure_of_nested_groups_is_raised_itself_with_its_own_cause() -> None:
    error = ValueError("first")
    error.__cause__ = cause = KeyError("cause")

    async def work() -> None:
        async with together() as outer:
            outer.create_task(waits())
            async with together() as inner:
                inner.create_task(fails(error))

    with pytest.raises(ValueError, match="first") as raised:
        await work()
    assert raised.value is error
    assert raised.value.__cause__ is cause


async def test_a_watch_ends_with_its_block() -> None:
    ended: list[str] = []
    async with beside(waits(ended)):
        await asyncio.sleep(0)
    assert ended == ["watch"]


async def test_the_error_of_a_watch_ends_the_block_and_that_of_the_block_the_watch() -> None:
    with pytest.raises(ValueError, match="seen"):
        async with beside(fails(ValueError("seen"))):
            await waits()
    with pytest.raises(ValueError, match="block"):
        async with beside(waits()):
            await fails(ValueError("block"))
