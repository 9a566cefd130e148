"""`Pool`: the replicas of one module as the flow sees them: found again or created, fed, repaired.

Calls go to the first free replica. A replica that dies is replaced, gets its dataset and the right
weights *before* it gets work, and the call that died with it raises `ReplicaDiedError`, so that the
caller hands the same shard to whoever is free. What says something of the work (it ended the
process, it gave no answer) is told apart from what does not (`NotBegunError`): only the first may
ever be put down to a sample. Every wait has a timeout that names what it waits for. Nothing here
touches a batch: arguments and results are references.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ObjectLostError, OwnerDiedError

from rlhf_flows.errors import (
    InputLostError,
    NoAnswerError,
    NotBegunError,
    PoolError,
    ReplicaDiedError,
    WaitTimeoutError,
)
from rlhf_flows.pools.actors import BESIDE, PoolActors, Replica
from rlhf_flows.pools.answers import DEAD, gather, last_line
from rlhf_flows.pools.messages import PoolSpec
from rlhf_flows.pools.streams import items_of

__all__ = ["Pool"]

logger = logging.getLogger(__name__)

_TRUSTED_S = 1.0
"""How long after its last answer a replica is taken to be alive without being asked."""
_SAY_AT_MOST_EACH_S = 60.0
"""How often a pool may say who keeps it waiting."""
_LOST = (ObjectLostError, OwnerDiedError)


BringTo = Callable[["Pool", Replica, int], Awaitable[None]]
"""Brings a replica to a policy version; the runtime knows where the weights are."""


@dataclass(slots=True, kw_only=True)
class Pool:
    """The replicas of one module."""

    spec: PoolSpec
    attempt: int
    setup_timeout_s: float
    max_restarts: int
    bring_to: BringTo | None = None
    on_incident: Callable[..., None] | None = None
    """Told of what went wrong: its kind, in words, and by names (`Runtime.incident`)."""
    check_fence: Callable[[], None] | None = None
    """Raises where a newer attempt took over; asked before an actor is started."""
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who brings all replicas to a version (a param sync), and by who asks them for an
    older one out of turn (a repair): calls that name their version need no lock."""
    _replicas: list[Replica] = field(default_factory=list)
    _free: asyncio.Queue[Replica] = field(default_factory=asyncio.Queue)
    _freed: int = 0
    """How often a replica came free."""
    _said: float = 0.0
    """When this pool last said who keeps it waiting."""
    _actors: PoolActors = field(init=False)

    def __post_init__(self) -> None:
        self._actors = PoolActors(
            self.spec,
            attempt=self.attempt,
            setup_timeout_s=self.setup_timeout_s,
            check_fence=self.check_fence,
        )

    @property
    def name(self) -> str:
        return self.spec.module_name

    @property
    def replicas(self) -> Sequence[Replica]:
        return self._replicas

    # ---- opening and closing --------------------------------------------------------------

    async def open(self) -> None:
        """Finds the replicas that live, creates the others. All are ready afterwards.

        Raises:
            PoolError: a replica does not come up; those that this call created are ended.
        """
        opened = await asyncio.gather(
            *(self._open(i) for i in range(self.spec.num_replica)), return_exceptions=True
        )
        failures = [r for r in opened if r is not None]
        if failures:
            # Those that were found are not this call's to end: a newer attempt may own them.
            for replica in self._replicas:
                if not replica.reattached:
                    self._actors.drop(replica)
            self._replicas.clear()
            raise failures[0]
        self._replicas.sort(key=lambda r: r.index)
        for replica in self._replicas:
            self._free.put_nowait(replica)
        self._actors.drop_surplus()

    async def _open(self, index: int) -> None:
        # Into the list at once: its lease is kept while the others load.
        self._replicas.append(await self._actors.open(index))

    def release(self) -> None:
        """Ends every actor of the pool, and frees what they held.

        Raises:
            FencedError: they are a newer attempt's by now; nothing was ended.
        """
        self._actors.release()
        self._replicas = []

    async def set_dataset(
        self, kind: str, digest: str, rows: Sequence[Any], parts: Sequence[int] = ()
    ) -> tuple[int, ...]:
        """Every replica builds the dataset of `rows`, unless it has it.

        Args:
            parts: How many of the rows belong to each of several datasets.

        Returns:
            The number of its items; of each part, where there are several.
        """
        return await self._actors.set_dataset(kind, digest, rows, parts, self._replicas)

    # ---- calls ----------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        *args: Any,
        what: str,
        timeout_s: float,
        version: int | None = None,
        num_returns: int = 1,
        wait_s: float | None = None,
        suspect: bool = False,
        as_held: bool = False,
    ) -> Any:
        """Calls `method` on the first free replica, on every rank; returns what rank 0 returned.

        With several returns, all but the last are references; the last is awaited.

        Args:
            what: Names the work in messages, such as "shard 3 of rollout of episode 2".
            timeout_s: For the answer, once a replica has begun; what it may wait for a store that
                is away (`store.retry_budget_s`) comes on top.
            version: The policy version that the replica must hold; it is brought there first.
            wait_s: For a replica to come free, `timeout_s` by default; counted anew whenever one
                does, for then the pool gets on with its work.
            suspect: The work itself may be what ends its worker: a death is not counted.
            as_held: The work needs what the replica holds: where it died, it is not begun on
                another in its place.

        Raises:
            ReplicaDiedError: the replica died while it worked.
            NoAnswerError: no answer in time; the replica is replaced.
            NotBegunError: no replica was free or ready.
            InputLostError: a reference that it was given is lost.
        """
        every_s = max(timeout_s / 4, _SAY_AT_MOST_EACH_S)
        async with (
            self._saying_who_keeps_it(what, every_s),
            self._claim(what, timeout_s if wait_s is None else wait_s, as_held) as replica,
        ):
            # A trained module in the middle of an episode is at no version.
            if version is not None and not (replica.version == version and replica.state.clean):
                await self._bring(replica, version, what)
            limit_s = timeout_s + self.spec.store_retry_budget_s
            answer = await self._call_on(replica, method, args, what, limit_s, num_returns, suspect)
            replica.deaths = 0
            return answer

    async def _bring(self, replica: Replica, version: int, what: str) -> None:
        assert self.bring_to is not None
        try:
            await self.bring_to(self, replica, version)
        except (ReplicaDiedError, WaitTimeoutError) as e:
            raise NotBegunError(
                f"{what} was not begun: replica {replica.index} of pool {self.name!r} did not get"
                f" to policy version {version}: {e}"
            ) from e

    async def broadcast(self, method: str, *args: Any, what: str, timeout_s: float) -> list[Any]:
        """Calls `method` on every replica at once. The caller holds them all (`moving`)."""
        return await asyncio.gather(
            *(
                self.on_replica(replica, method, *args, what=what, timeout_s=timeout_s)
                for replica in list(self._replicas)
            )
        )

    async def on_replica(
        self,
        replica: Replica,
        method: str,
        *args: Any,
        what: str,
        timeout_s: float,
        waits_for_store: bool = True,
    ) -> Any:
        """Calls `method` on one replica. The caller holds it, or does not mind who works on it."""
        timeout_s += self.spec.store_retry_budget_s if waits_for_store else 0
        return await self._call_on(replica, method, args, what, timeout_s, 1, False)

    async def beside(
        self, replica: Replica, method: str, *args: Any, what: str, timeout_s: float
    ) -> list[Any]:
        """Calls `method` on every rank of a replica while it works on other calls
        (`PoolSpec.works_beside`): what each rank returned.

        No collective may be in it, so that a rank that fails leaves the others as they are. A death
        counts where the work is that the replica does meanwhile.

        Raises:
            ReplicaDiedError: the process of a rank is gone.
            NoAnswerError: not all answered in time; the replica is replaced.
        """
        ranks = replica.ranks
        calls = [getattr(r, method).options(concurrency_group=BESIDE).remote(*args) for r in ranks]
        waiting_for = f"{what} on replica {replica.index} of pool {self.name!r}"
        try:
            limit_s = timeout_s + self.spec.store_retry_budget_s
            return await gather(calls, limit_s, waiting_for, ranks=replica.names)
        except NoAnswerError:
            if replica.ranks is ranks:
                self._actors.end_group(replica)
            raise
        except DEAD as e:
            # Its work hears of it, too, and counts the death: who comes first must not matter.
            if replica.ranks is ranks and not replica.working_on:
                replica.alive = False
            raise ReplicaDiedError(
                f"replica {replica.index} of pool {self.name!r} died during {what}: {last_line(e)}"
            ) from e

    async def stream(
        self, method: str, *args: Any, what: str, timeout_s: float
    ) -> AsyncGenerator[Any, None]:
        """What rank 0 of the first free replica yields in `method`, which all its ranks run.

        It makes one item ahead and waits. A caller that stops early uses `contextlib.aclosing`; the
        ranks then run to their end, with nobody taking what they yield.

        Args:
            timeout_s: For all of it, what the caller does in between included.

        Raises:
            ReplicaDiedError: a rank died.
            NoAnswerError: an item, or the end, did not come in time. The replica is left to it, and
                looked at before it gets other work.
            NotBegunError: no replica was free or ready.
        """
        deadline = time.monotonic() + timeout_s
        async with self._claim(what, timeout_s) as replica:
            try:
                items = items_of(replica.ranks, method, args, deadline, what)
                async with contextlib.aclosing(items):
                    async for item in items:
                        yield item
                        del item  # before the next one is asked for
            except DEAD as e:
                self._count_death(replica, suspect=False)
                raise ReplicaDiedError(
                    f"replica {replica.index} of pool {self.name!r} died during {what}:"
                    f" {last_line(e)}"
                ) from e
            except BaseException:  # its other ranks may still be at work
                replica.unanswered = True
                raise
            replica.deaths = 0

    def give_up(self, replica: Replica) -> None:
        """It is in no known state, and is replaced before it works again. Not counted as a death,
        and not ended here: it may be a newer attempt's by now.
        """
        replica.alive = False

    def tell(self, replica: Replica, method: str, *args: Any) -> None:
        """Calls `method` on every rank of a replica without waiting for an answer."""
        if replica.alive:
            for rank in replica.ranks:
                getattr(rank, method).remote(self.attempt, *args)

    @contextlib.asynccontextmanager
    async def _claim(
        self, what: str, wait_s: float, as_held: bool = False
    ) -> AsyncIterator[Replica]:
        replica = await self._next_free(what, wait_s)
        idle_s = time.monotonic() - replica.since
        try:
            replica.working_on, replica.since = what, time.monotonic()
            try:
                if replica.alive and (replica.unanswered or idle_s > _TRUSTED_S):
                    await self._look_at(replica, wait_s)
                if not replica.alive:
                    if as_held:
                        raise NotBegunError(
                            f"{what} was not begun: replica {replica.index} of pool"
                            f" {self.name!r} died, and what it held with it"
                        )
                    await self._replace(replica, what)
            except NotBegunError:
                raise
            except WaitTimeoutError as e:
                raise NotBegunError(f"{what} was not begun: {e}") from e
            yield replica
        finally:
            replica.working_on, replica.since = "", time.monotonic()
            self._freed += 1
            self._free.put_nowait(replica)

    async def _look_at(self, replica: Replica, wait_s: float) -> None:
        """Waits for what was left to it, and asks it for a sign of life, before it gets work:
        whoever is dead or stuck by now must not be put down to that work."""
        # Its calls run in order, so that an answer also says that those before are through.
        signs = [rank.heartbeat.remote(self.attempt) for rank in replica.ranks]
        waiting_for = f"replica {replica.index} of pool {self.name!r} to finish its last call"
        if len(signs) > 1 and not replica.unanswered:  # idle ranks have nothing to finish
            wait_s = min(wait_s, self.spec.collective_timeout_s)
        try:
            await gather(signs, wait_s, waiting_for, ranks=replica.names)
        except (NoAnswerError, *DEAD) as e:
            logger.warning("%s", e)
            self._actors.end_group(replica)
        replica.unanswered = False

    async def _next_free(self, what: str, wait_s: float) -> Replica:
        while True:
            freed = self._freed
            try:
                async with asyncio.timeout(wait_s):
                    return await self._free.get()
            except TimeoutError as e:
                if self._freed != freed:
                    continue
                raise NotBegunError(
                    f"{what} waited {wait_s:g} s for a free replica of pool {self.name!r}:"
                    f" {self._occupation()}"
                ) from e

    def tell_incident(self, kind: str, what: str, **facts: Any) -> None:
        """To whoever asked for it."""
        if self.on_incident is not None:
            self.on_incident(kind, what, pool=self.name, **facts)

    def _occupation(self) -> str:
        return "; ".join(self._occupation_of(r) for r in self._replicas)

    def _occupation_of(self, replica: Replica) -> str:
        if not replica.working_on:
            return f"replica {replica.index} is {'idle' if replica.alive else 'dead'}"
        seconds = time.monotonic() - replica.since
        where = f"process {replica.state.pid} on {replica.state.host}"
        return (
            f"replica {replica.index} works on {replica.working_on} since {seconds:.0f} s"
            f" (actor {self._actors.name_of(replica.index, 0)},"
            f" {where if replica.alive else 'being replaced'})"
        )

    @contextlib.asynccontextmanager
    async def _saying_who_keeps_it(self, what: str, every_s: float) -> AsyncIterator[None]:
        """Warns again and again while the work inside takes long: once for all calls that wait."""
        saying = asyncio.create_task(self._say_who_keeps_it(what, every_s))
        try:
            yield
        finally:
            saying.cancel()

    async def _say_who_keeps_it(self, what: str, every_s: float) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(every_s)
            now = time.monotonic()
            if now - self._said < every_s / 2:
                continue
            self._said = now
            waits = f"{what} is waited for since {now - started:.0f} s"
            told = f"{waits}: pool {self.name!r}: {self._occupation()}"
            logger.warning("run %s: %s", self.spec.run, told)
            self.tell_incident("stall", told, seconds=now - started)

    async def _call_on(
        self,
        replica: Replica,
        method: str,
        args: Sequence[Any],
        what: str,
        timeout_s: float,
        num_returns: int,
        suspect: bool,
    ) -> Any:
        waiting_for = f"{what} on replica {replica.index} of pool {self.name!r}"
        try:
            answers = [
                getattr(rank, method).options(num_returns=num_returns).remote(*args)
                for rank in replica.ranks
            ]
            last = [a[-1] if num_returns > 1 else a for a in answers]
            results = await gather(
                last,
                timeout_s,
                waiting_for,
                ranks=replica.names,
                on_torn=lambda: self._actors.end_group(replica),
            )
        except asyncio.CancelledError:
            replica.unanswered = True
            raise
        except NoAnswerError:
            # What it does is unknown; only a new process is known to be idle.
            self._actors.end_group(replica)
            self._count_death(replica, suspect=suspect)
            raise
        except DEAD as e:
            self._count_death(replica, suspect=suspect)
            raise ReplicaDiedError(
                f"replica {replica.index} of pool {self.name!r} died during {what}: {last_line(e)}"
            ) from e
        except _LOST as e:
            raise InputLostError(f"an input of {what} was lost: {last_line(e)}") from e
        return [*answers[0][:-1], results[0]] if num_returns > 1 else results[0]

    @staticmethod
    def _count_death(replica: Replica, *, suspect: bool) -> None:
        # Of several calls that it had, the first to know.
        replica.deaths += replica.alive and not suspect
        replica.alive = False

    async def _replace(self, dead: Replica, what: str) -> None:
        if dead.deaths > self.max_restarts:
            raise PoolError(
                f"pool {self.name!r}: replica {dead.index} died {dead.deaths} times without"
                " finishing anything in between, more than"
                f" runtime.max_replica_restarts={self.max_restarts}: look into the worker logs of"
                f" Ray for the cause ({what} is not begun)"
            )
        logger.warning("replica %d of pool %r is replaced", dead.index, self.name)
        await self.rebuild(dead)

    async def rebuild(self, replica: Replica) -> None:
        """A new process in place of the replica's: a module as its `setup` leaves it."""
        if not replica.alive:
            what = f"replica {replica.index} of pool {self.name!r} died and is replaced"
            self.tell_incident("actor-restart", what, replica=replica.index, deaths=replica.deaths)
        await self._actors.rebuild(replica)

    async def heartbeat(self) -> None:
        """Keeps the lease of idle replicas; a busy one keeps its own."""
        for replica in self._replicas:
            if not replica.working_on:
                self.tell(replica, "heartbeat")
