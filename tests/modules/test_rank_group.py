"""Real processes in real gloo groups: who is lost is named, by the ranks that are left."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import HashStore

from rlhf_flows.errors import RankLostError, WaitTimeoutError
from rlhf_flows.modules.rank_group import (
    LOOPBACK,
    RankGroup,
    hold_store,
    join_ranks,
    reach_store,
    talk_over,
)

TIMEOUT_S = 4.0
PATIENCE_S = 60.0


def serve(pipe: Any, rank: int, world_size: int, lost: int, how: str) -> None:
    """One rank: meets the others, then waits for all in a section; `lost` does what `how` says."""
    talk_over(LOOPBACK)
    store: Any
    if rank == 0:
        store = hold_store(LOOPBACK)
        pipe.send(store.port)
    else:
        store = reach_store(LOOPBACK, pipe.recv(), timeout_s=PATIENCE_S)
    group = RankGroup(store, rank=rank, world_size=world_size, collective_timeout_s=TIMEOUT_S)
    with group.section("setup"):
        torch.distributed.barrier()
    pipe.send(os.getpid())
    if rank == lost and how == "never enters":
        time.sleep(PATIENCE_S)
    started = time.monotonic()
    try:
        with group.section("training step 3 of episode 2"):
            torch.distributed.barrier()
            if rank == lost:
                lose(how)
            torch.distributed.all_reduce(torch.ones(3))
        said = "nothing"
    except RankLostError as e:
        said = str(e)
    except ValueError as e:
        said = f"own error: {e}"
    pipe.send((said, time.monotonic() - started))
    time.sleep(PATIENCE_S)  # until it is ended: who is done still answers


def lose(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "slow":
        time.sleep(PATIENCE_S)
    if how == "raises":
        raise ValueError("no such column")


class Started:
    def __init__(self, world_size: int, lost: int, how: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "rlhf_flows.modules.rank_group"])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, world_size, lost, how)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        port = self.recv(0)
        for pipe in self.pipes[1:]:
            pipe.send(port)
        self.pids = [self.recv(r) for r in range(world_size)]

    def recv(self, rank: int) -> Any:
        assert self.pipes[rank].poll(PATIENCE_S), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[Started]:
    ranks = Started(*request.param)
    yield ranks
    ranks.end()


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("started", "lost", "says", "most_s"),
    [
        ((2, 1, "killed"), 1, "is gone; it has been in training step 3 of episode 2", 2.0),
        ((2, 0, "killed"), 0, "is gone or does not answer", 3.0),
        ((2, 1, "stopped"), 1, "does not answer; it has been in training step 3", TIMEOUT_S + 3),
        slow((2, 0, "stopped"), 0, "is gone or does not answer", TIMEOUT_S + 4),
        ((2, 1, "slow"), 1, r"is at line \d+ of \S+test_rank_group.py \(lose\)", TIMEOUT_S + 3),
        slow((2, 1, "never enters"), 1, "is in no call; it has been idle for", TIMEOUT_S + 3),
        slow(
            (2, 1, "raises"), 1, "it raised an error of its own in training step 3", TIMEOUT_S + 3
        ),
        # Those who do not talk to it notice nothing: they wait for their time.
        slow((4, 2, "killed"), 2, "is gone; it has been in training step", TIMEOUT_S + 3),
        slow((4, 2, "stopped"), 2, "does not answer; it has been in training ", TIMEOUT_S + 3),
        slow((4, 3, "slow"), 3, "is at line", TIMEOUT_S + 3),
    ],
    indirect=["started"],
    ids=str,
)
def test_a_rank_names_the_one_that_it_waits_for_and_what_that_one_does(
    started: Started, lost: int, says: str, most_s: float
) -> None:
    for rank in range(len(started.pids)):
        if rank == lost:
            continue
        said, seconds = started.recv(rank)
        print(f"rank {rank} after {seconds:.2f} s: {said}")
        assert f"rank {rank} of {len(started.pids)} was in training step 3 of episode 2" in said
        found = re.search(r"and lost (.*?)(:| \()", said)
        assert found is not None
        assert found.group(1) == f"rank {lost}"
        assert f"rank {lost} (process {started.pids[lost]} on {socket.gethostname()})" in said
        assert re.search(says, said), said
        assert seconds < most_s


def test_a_rank_says_which_others_did_not_come() -> None:
    store = HashStore()
    store.set("arrived/2", "1")
    begun = time.monotonic()
    with pytest.raises(WaitTimeoutError, match=r"rank 0 of 4 waited 0\.2 s for rank 1, 3"):
        join_ranks(store, rank=0, world_size=4, timeout_s=0.2)
    assert time.monotonic() - begun < 10


def test_a_store_that_nobody_holds_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
        with pytest.raises(WaitTimeoutError, match=rf"rank 0 at {LOOPBACK}:{port} gave no answer"):
            reach_store(LOOPBACK, port, timeout_s=0.5)


def test_many_stores_opened_at_once_never_share_a_port_and_listen_where_they_were_told() -> None:
    with ThreadPoolExecutor(16) as threads:
        stores = list(threads.map(lambda _: hold_store(LOOPBACK), range(64)))
    ports = {store.port for store in stores}
    assert len(ports) == 64
    listening = [
        c.laddr
        for c in psutil.Process().net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
    ]
    assert {address.ip for address in listening} == {LOOPBACK}
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((LOOPBACK, port))


def test_collectives_use_the_interface_of_an_address_unless_the_environment_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "taken back after the test")
        monkeypatch.delenv(name)
    talk_over("203.0.113.1")  # of no interface here
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    talk_over(LOOPBACK)
    loopback = os.environ["GLOO_SOCKET_IFNAME"]
    assert any(a.address == LOOPBACK for a in psutil.net_if_addrs()[loopback])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    talk_over(LOOPBACK)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


def test_a_section_costs_less_than_two_hundred_microseconds() -> None:
    group = RankGroup(hold_store(LOOPBACK), rank=0, world_size=1, collective_timeout_s=10)
    try:
        best_s = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(200):
                with group.section("training step 3 of episode 2"):
                    pass
            best_s = min(best_s, (time.perf_counter() - started) / 200)
        print(f"a section: {best_s * 1e6:.1f} microseconds")
        assert best_s < 2e-4
    finally:
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()
