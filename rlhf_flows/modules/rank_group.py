"""The ranks of one replica as a group: how they meet, what each is in, whom one waits for in vain.

The decision here: each rank notes in a store that rank 0 holds what it is in, as collectives name
nobody when they fail. A rank whose collective fails asks: who fails as well has waited, too; who is
gone, does not answer or is elsewhere is who was waited for. Knows nothing of Ray.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # of C

from rlhf_flows.errors import RankLostError, WaitTimeoutError

__all__ = ["LOOPBACK", "RankGroup", "hold_store", "join_ranks", "reach_store", "talk_over"]

AnswerT = TypeVar("AnswerT")

LOOPBACK = "127.0.0.1"
_ASK_S = 1.0
"""For the others to fail as well, or to say where they are."""
_COLLECTIVE = ("gloo/transport", "pair closure", "NCCL", "ProcessGroup")
"""What an error of a collective says that torch raises as a plain RuntimeError."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_DISTRIBUTED = os.path.join(_TORCH, "distributed") + os.sep


# ---- meeting ----------------------------------------------------------------------------------


def hold_store(host: str) -> TCPStore:
    """A store for the ranks of one group that listens on `host` alone, while the object lives.

    Its port is taken from the moment it is chosen: nobody else can come between.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def reach_store(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """The store that rank 0 holds. Raises WaitTimeoutError where nobody answers there."""
    try:
        return TCPStore(
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as cause:  # torch.distributed.DistError is one
        raise WaitTimeoutError(
            f"the store of rank 0 at {host}:{port} gave no answer to {_process()} within"
            f" {timeout_s:g} s: see whether rank 0 lives, and whether this node reaches its node"
        ) from cause


def talk_over(address: str) -> None:
    """Has the collectives of this process use the network interface that has `address`.

    What the environment names already stays. NCCL is bound to loopback alone: between nodes it
    knows better which of several cards to use.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if address == LOOPBACK:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
            return


def join_ranks(
    store: Store, *, rank: int, world_size: int, timeout_s: float, device: str = "cpu"
) -> list[str]:
    """Collective: every rank. Makes the default process group; which process each rank is.

    `store` is one that all ranks reach, such as a `TCPStore`; `timeout_s` is also how long any
    later collective of these ranks waits.

    Raises WaitTimeoutError that names the ranks that did not come.
    """
    names = [f"arrived/{r}" for r in range(world_size)]
    store.set(names[rank], _process())
    try:
        store.wait(names, timedelta(seconds=timeout_s))
    except RuntimeError as cause:  # torch.distributed.DistStoreError is one
        missing = [str(r) for r, name in enumerate(names) if not store.check([name])]
        raise WaitTimeoutError(
            f"rank {rank} of {world_size} waited {timeout_s:g} s for rank"
            f" {', '.join(missing) or '(none: they came at the last moment)'}: see what these"
            " processes say, or allow a longer timeout"
        ) from cause
    torch.distributed.init_process_group(
        "nccl" if torch.device(device).type == "cuda" else "gloo",
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return [store.get(name).decode() for name in names]


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


# ---- what each is in --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What a rank says of itself."""

    doing: str
    state: str
    """`in` it, `out` of it, `raised` in it, or `failed` in it because another rank is lost."""
    at: float
    """When that began, by the clock of its node."""

    def __str__(self) -> str:
        seconds = f"{max(0.0, time.time() - self.at):.0f} s"
        if not self.doing:
            return f"it has been asked for nothing yet, since {seconds}"
        if self.state == "out":
            return f"it has been idle for {seconds}, since it left {self.doing}"
        if self.state == "raised":
            return f"it raised an error of its own in {self.doing}, {seconds} ago"
        return f"it has been in {self.doing} for {seconds}"


@dataclass(slots=True, kw_only=True)
class _Other:
    """What is known of another rank when a collective has failed."""

    rank: int
    process: str
    note: _Note
    is_gone: bool = False
    where: str | None = None
    """The line that it is at, where it answered."""
    in_collective: bool = False

    def __str__(self) -> str:
        how = "does not answer" if self.where is None else f"is {self.where}"
        if self.is_gone:
            how = "is gone"
        return f"rank {self.rank} ({self.process}) {how}; {self.note}"


class RankGroup:
    """The ranks of one replica, seen by one of them."""

    def __init__(
        self,
        store: TCPStore,
        *,
        rank: int,
        world_size: int,
        collective_timeout_s: float,
        device: str = "cpu",
    ) -> None:
        """Collective: every rank. Makes the default process group.

        Args:
            store: That of `hold_store` on rank 0, of `reach_store` on the others.
            collective_timeout_s: How long any collective waits, and this meeting.

        Raises:
            WaitTimeoutError: a rank did not come; it is named.
        """
        self.rank, self.world_size = rank, world_size
        self._timeout_s = collective_timeout_s
        self._held = store
        self._store = _connection(store)
        self._thread = 0
        self._say("", "out")
        self._processes = join_ranks(
            store,
            rank=rank,
            world_size=world_size,
            timeout_s=collective_timeout_s,
            device=device,
        )
        threading.Thread(
            target=self._answer_who_asks, args=(_connection(store),), daemon=True, name="rank"
        ).start()

    @contextmanager
    def section(self, doing: str) -> Iterator[None]:
        """Around what may wait for other ranks; `doing` names it to them, such as "training step 3
        of episode 2". Costs some 20 microseconds.

        Raises:
            RankLostError: a collective failed inside; names the rank that was waited for.
        """
        started = time.time()
        self._thread = threading.get_ident()
        try:
            self._say(doing, "in")
            yield
        except Exception as error:
            if isinstance(error, RankLostError) or not _is_of_collective(error):
                self._say(doing, "raised", or_else_lost=False)
                raise
            raise self._lost(doing, started) from error
        finally:
            self._thread = 0
        self._say(doing, "out", or_else_lost=False)

    def _say(self, doing: str, state: str, *, or_else_lost: bool = True) -> None:
        note = {"doing": doing, "state": state, "at": time.time()}
        try:
            self._store.set(f"note/{self.rank}", json.dumps(note))
        except RuntimeError:  # rank 0 is gone: said where somebody waits for it
            if or_else_lost:
                raise

    # ---- whom it waits for ----------------------------------------------------------------

    def _lost(self, doing: str, started: float) -> RankLostError:
        waited = f"rank {self.rank} of {self.world_size} was in {doing} for"
        waited += f" {time.time() - started:.0f} s and lost"
        advice = (
            "The group is to be replaced. See what that process says; if it is only slow, allow"
            f" more than runtime.collective_timeout_s={self._timeout_s:g}"
        )
        # Whoever holds the store may be stopped: no wait of a socket's may keep this rank.
        others = _within(2 * _ASK_S, lambda: self._ask(doing))
        if others is None:
            first = f"rank 0 ({self._processes[0]}), which keeps what ranks say of themselves"
            return RankLostError(f"{waited} {first}: it is gone or does not answer. {advice}")
        left = [o for o in others if o.note.state != "failed"]
        found = (
            [o for o in left if o.is_gone]
            or [o for o in left if o.where is None]
            or [o for o in left if not o.in_collective]
            or left
        )
        if not found:
            return RankLostError(
                f"{waited} the connection to the others, who lost theirs as well: look at the"
                " network between their nodes"
            )
        names = ", ".join(f"rank {o.rank}" for o in found)
        return RankLostError(f"{waited} {names}: {'; '.join(map(str, found))}. {advice}")

    def _ask(self, doing: str) -> list[_Other]:
        """Has every rank say where it is; until all have failed, are gone, or it takes too long."""
        self._say(doing, "failed")
        self._store.set("ask", "")
        others = [
            _Other(rank=r, process=p, note=_Note(doing="", state="out", at=time.time()))
            for r, p in enumerate(self._processes)
            if r != self.rank
        ]
        deadline = time.monotonic() + _ASK_S
        while True:
            notes = self._store.multi_get([f"note/{o.rank}" for o in others])
            for other, note in zip(others, notes, strict=True):
                other.note = _Note(**json.loads(note))
                other.is_gone = _is_gone(other.process)
                key = f"where/{other.rank}"
                if other.where is None and self._store.check([key]):
                    other.where, other.in_collective = json.loads(self._store.get(key))
            is_clear = all(o.is_gone or o.note.state == "failed" for o in others)
            if is_clear or time.monotonic() > deadline:
                return others
            time.sleep(0.02)

    def _answer_who_asks(self, store: Store) -> None:
        """Once: a group in which a rank was lost works no more."""
        try:
            store.wait(["ask"], timedelta(days=365))
            store.set(f"where/{self.rank}", json.dumps(_where(self._thread)))
        except RuntimeError:  # rank 0 is gone, or this process ends
            return


def _connection(store: TCPStore) -> Store:
    """One more, as a wait on one keeps all who use it waiting."""
    return store.clone()  # type: ignore[attr-defined, no-any-return]  # of C


def _is_of_collective(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a collective's that failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.distributed.DistError | RankLostError):
            return True
        if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _COLLECTIVE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_gone(process: str) -> bool:
    """Whether a process as `_process` names it has ended; not known of another host."""
    _, pid, _, host = process.split(" ", 3)
    if host != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _where(thread: int) -> tuple[str, bool]:
    """The innermost line of a thread outside of torch; and whether it is in a collective."""
    frame: Any = sys._current_frames().get(thread)
    in_collective, line = False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        in_collective |= file.startswith(_DISTRIBUTED)
        if not line and not file.startswith(_TORCH):
            line = f"at line {frame.f_lineno} of {file} ({frame.f_code.co_name})"
        frame = frame.f_back
    return line or "in no call", in_collective


def _within(seconds: float, asked: Callable[[], AnswerT]) -> AnswerT | None:
    """What `asked` returns; None where it takes longer, or a store is not there."""
    answers: list[AnswerT] = []

    def ask() -> None:
        try:
            answers.append(asked())
        except RuntimeError:  # torch.distributed.DistError is one
            return

    thread = threading.Thread(target=ask, daemon=True, name="ask")
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
