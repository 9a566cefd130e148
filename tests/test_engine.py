"""`learn` where a loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from rlhf_flows.engine import _in_own_loop


@pytest.fixture
def begun() -> list[str]:
    return []


def interrupted(begun: list[str]) -> None:
    """Calls as a cell of a notebook does: asyncio leaves Ctrl-C to Python there."""

    async def work() -> None:
        begun.append("work")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    async def cell() -> None:
        _in_own_loop(work)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(cell())
    finally:
        loop.close()


def test_ctrl_c_ends_what_runs(begun: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(begun)
    assert begun == ["work"]


def test_ctrl_c_that_comes_before_the_loop_runs_ends_it_too(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new_event_loop = asyncio.new_event_loop
    loops = 0

    def interrupting() -> asyncio.AbstractEventLoop:
        nonlocal loops
        loops += 1
        if loops == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # until the main thread has taken it
        return new_event_loop()

    monkeypatch.setattr("asyncio.events.new_event_loop", interrupting)
    with pytest.raises(KeyboardInterrupt):
        interrupted(begun)
    assert begun == []
