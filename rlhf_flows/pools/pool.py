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
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
)

from rlhf_flows.errors import (
    NoAnswerError,
    NotBegunError,
    PoolError,
    ReplicaDiedError,
    TransientError,
    WaitTimeoutError,
)
from rlhf_flows.pools.messages import PoolSpec, WorkerState
from rlhf_flows.pools.worker import Worker

__all__ = ["Pool", "Replica", "namespace_of"]

logger = logging.getLogger(__name__)

_ATTACH_TIMEOUT_S = 120.0
_LOADS = 3
"""Times that a replica is started before its deaths while it loads are no accident."""
_SAY_AT_MOST_EACH_S = 60.0
"""How often a pool may say who keeps it waiting."""
_CPU_ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={1 << 30}",
        f"glibc.malloc.trim_threshold={1 << 30}",
        f"glibc.malloc.top_pad={64 << 20}",
    )
)
"""Memory of tensors up to 1 GiB is kept and used again, in huge pages: activations come and go by
the hundred megabytes each step, and a tenth of a training pass went into fresh pages."""
_DEAD = (RayActorError, ActorDiedError, ActorUnavailableError, OutOfMemoryError)
_LOST = (ObjectLostError, OwnerDiedError)


def namespace_of(run: str) -> str:
    """The Ray namespace of a run's actors."""
    return f"rlhf_flows/{run}"


@dataclass(slots=True, kw_only=True)
class Replica:
    """One copy of the module: an actor for each rank."""

    index: int
    ranks: list[Any]
    state: WorkerState
    working_on: str = ""
    since: float = 0.0
    alive: bool = True

    @property
    def version(self) -> int:
        return self.state.version


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
    check_fence: Callable[[], None] | None = None
    """Raises where a newer attempt took over; asked before an actor is started."""
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who brings all replicas to a version (a param sync), and by who asks them for an
    older one out of turn (a repair): calls that name their version need no lock."""
    reattached: int = 0
    """Replicas that were found alive."""
    _replicas: list[Replica] = field(default_factory=list)
    _free: asyncio.Queue[Replica] = field(default_factory=asyncio.Queue)
    _datasets: dict[str, tuple[str, Any]] = field(default_factory=dict)
    _deaths: list[str] = field(default_factory=list)
    """What each death of this phase happened on, less those that were put down to a sample."""
    _freed: int = 0
    """How often a replica came free."""
    _said: float = 0.0
    """When this pool last said who keeps it waiting."""
    _created: list[Any] = field(default_factory=list)
    """Actors that `open` started, until it is through."""

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
            *(self._open_replica(i) for i in range(self.spec.num_replica)), return_exceptions=True
        )
        failures = [r for r in opened if isinstance(r, BaseException)]
        if failures:
            # Those that were found are not this call's to end: a newer attempt may own them.
            self._kill(self._created)
            raise failures[0]
        self._replicas = [r for r in opened if isinstance(r, Replica)]
        for replica in self._replicas:
            self._free.put_nowait(replica)
        self._created.clear()
        self._drop_surplus()

    async def _open_replica(self, index: int) -> Replica:
        found = await self._find(index)
        if found is not None:
            self.reattached += 1
            return found
        return await self._create(index)

    async def _find(self, index: int) -> Replica | None:
        actors = []
        for rank in range(self.spec.ranks_per_replica):
            try:
                actors.append(ray.get_actor(self._actor_name(index, rank), self._namespace))
            except ValueError:
                if actors:  # a group with a dead rank is no group
                    await self._end(index, actors)
                return None
        try:
            waiting_for = f"replica {index} of pool {self.name!r} to finish its last call"
            states = await self._gather(
                [a.attach.remote(self.attempt) for a in actors], _ATTACH_TIMEOUT_S, waiting_for
            )
        except (TransientError, *_DEAD):
            states = []
        fits = states and all(s.ready and s.digest == self.spec.digest for s in states)
        if not fits or len({s.version for s in states}) > 1:
            logger.info("replica %d of pool %r is of another making: rebuilt", index, self.name)
            await self._end(index, actors)
            return None
        return Replica(index=index, ranks=actors, state=states[0])

    async def _create(self, index: int) -> Replica:
        """Starts a replica and loads its model; anew where its process is killed meanwhile."""
        for left in reversed(range(_LOADS)):
            try:
                return await self._load(index)
            except ReplicaDiedError as e:
                if not left:
                    raise PoolError(
                        f"pool {self.name!r}: the process of replica {index} died {_LOADS} times"
                        f" while it loaded its model ({_last_line(e)}): look for memory running"
                        " out, and into Ray's worker logs"
                    ) from e
                logger.warning("%s: it is started again", e)
                await self._wait_for_names(index)
        raise AssertionError("the last load returns or raises")

    async def _load(self, index: int) -> Replica:
        if self.check_fence is not None:
            # A zombie must not take the names of the actors that a newer attempt brings up.
            await asyncio.to_thread(self.check_fence)
        ranks = [self._start_actor(index, rank) for rank in range(self.spec.ranks_per_replica)]
        self._created += ranks
        waiting_for = f"pool {self.name!r}, replica {index}, to load its model"
        try:
            rendezvous = None
            if len(ranks) > 1:
                rendezvous = await self._await(
                    ranks[0].rendezvous.remote(), self.setup_timeout_s, waiting_for
                )
            states = await self._gather(
                [r.setup.remote(self.attempt, rendezvous) for r in ranks],
                self.setup_timeout_s,
                waiting_for,
            )
            replica = Replica(index=index, ranks=ranks, state=states[0])
            await self._give_datasets(replica)
        except _DEAD as e:
            self._kill(ranks)
            raise ReplicaDiedError(
                f"pool {self.name!r}: the process of replica {index} died while it loaded its"
                f" model ({_last_line(e)})"
            ) from e
        except BaseException:  # cancelled as well: half-loaded actors are detached, and would stay
            self._kill(ranks)
            raise
        return replica

    def _start_actor(self, index: int, rank: int) -> Any:
        spec = self.spec
        threads = str(spec.num_threads)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "PYTHONPATH": _import_path(),
        }
        if not spec.num_gpu and "GLIBC_TUNABLES" not in os.environ:
            environment["GLIBC_TUNABLES"] = _CPU_ALLOCATOR
        actor_class = ray.remote(Worker)
        return actor_class.options(
            name=self._actor_name(index, rank),
            namespace=self._namespace,
            lifetime="detached",
            num_cpus=spec.num_cpu,
            num_gpus=spec.num_gpu,
            memory=spec.memory_bytes or None,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        ).remote(spec, replica=index, rank=rank)

    async def _end(self, index: int, actors: Sequence[Any]) -> None:
        """Ends actors and waits until their names are free."""
        self._kill(actors)
        await self._wait_for_names(index)

    async def _wait_for_names(self, index: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            names = {self._actor_name(index, r) for r in range(self.spec.ranks_per_replica)}
            if not names & _living(self._namespace):
                return
            await asyncio.sleep(0.05)
        raise WaitTimeoutError(
            f"pool {self.name!r}: the actors of replica {index} did not end within 30 s"
        )

    def _drop_surplus(self) -> None:
        """Ends replicas of an earlier attempt that had more of them."""
        mine = {
            self._actor_name(i, r)
            for i in range(self.spec.num_replica)
            for r in range(self.spec.ranks_per_replica)
        }
        for name in _living(self._namespace) - mine:
            if name.startswith(f"{self.name}/"):
                with contextlib.suppress(ValueError):
                    self._kill([ray.get_actor(name, self._namespace)])

    def release(self) -> None:
        """Ends every actor of the pool, and frees what they held."""
        for name in _living(self._namespace):
            if name.startswith(f"{self.name}/"):
                with contextlib.suppress(ValueError):
                    self._kill([ray.get_actor(name, self._namespace)])
        self._replicas = []

    @staticmethod
    def _kill(actors: Sequence[Any]) -> None:
        for actor in actors:
            ray.kill(actor, no_restart=True)

    @property
    def _namespace(self) -> str:
        return namespace_of(self.spec.run)

    def _actor_name(self, index: int, rank: int) -> str:
        return f"{self.name}/{index}/{rank}"

    # ---- datasets -------------------------------------------------------------------------

    async def set_dataset(self, kind: str, digest: str, rows: Any) -> None:
        """Every replica builds the dataset of `rows`, unless it has it."""
        self._datasets[kind] = (digest, ray.put(list(rows)))
        await asyncio.gather(*(self._give_datasets(r) for r in self._replicas))

    async def _give_datasets(self, replica: Replica) -> None:
        for kind, (digest, rows) in self._datasets.items():
            if (kind, digest) not in replica.state.datasets:
                await self._gather(
                    [
                        rank.load_dataset.remote(self.attempt, kind, digest, rows)
                        for rank in replica.ranks
                    ],
                    self.setup_timeout_s,
                    f"pool {self.name!r} to build the {kind} dataset",
                )

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
    ) -> Any:
        """Calls `method` on the first free replica, on every rank; returns what rank 0 returned.

        With several returns, all but the last are references; the last is awaited.

        Args:
            what: Names the work in messages, such as "shard 3 of rollout of episode 2".
            timeout_s: For the answer, once a replica has begun.
            version: The policy version that the replica must hold; it is brought there first.
            wait_s: For a replica to come free, `timeout_s` by default; counted anew whenever one
                does, for then the pool gets on with its work.
            suspect: The work itself may be what ends its worker: a death is not counted.

        Raises:
            ReplicaDiedError: the replica died while it worked.
            NoAnswerError: no answer in time; the replica is replaced.
            NotBegunError: no replica was free or ready, or a reference it was given is lost.
        """
        every_s = max(timeout_s / 4, _SAY_AT_MOST_EACH_S)
        async with (
            self._saying_who_keeps_it(what, every_s),
            self._claim(what, timeout_s if wait_s is None else wait_s) as replica,
        ):
            if version is not None and replica.version != version:
                await self._bring(replica, version, what)
            return await self._call_on(replica, method, args, what, timeout_s, num_returns, suspect)

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
        """Calls `method` on every replica at once, each as soon as it is free."""
        return await asyncio.gather(
            *(
                self.on_replica(replica, method, *args, what=what, timeout_s=timeout_s)
                for replica in list(self._replicas)
            )
        )

    async def on_replica(
        self, replica: Replica, method: str, *args: Any, what: str, timeout_s: float
    ) -> Any:
        """Calls `method` on one replica. The caller holds it, or does not mind who works on it."""
        return await self._call_on(replica, method, args, what, timeout_s, 1, False)

    def tell(self, replica: Replica, method: str, *args: Any) -> None:
        """Calls `method` on every rank of a replica without waiting for an answer."""
        if replica.alive:
            for rank in replica.ranks:
                getattr(rank, method).remote(self.attempt, *args)

    @contextlib.asynccontextmanager
    async def _claim(self, what: str, wait_s: float) -> AsyncIterator[Replica]:
        replica = await self._next_free(what, wait_s)
        try:
            replica.working_on, replica.since = what, time.monotonic()
            if not replica.alive:
                try:
                    await self._replace(replica)
                except WaitTimeoutError as e:
                    raise NotBegunError(f"{what} was not begun: {e}") from e
            yield replica
        finally:
            replica.working_on = ""
            self._freed += 1
            self._free.put_nowait(replica)

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

    def _occupation(self) -> str:
        return "; ".join(self._occupation_of(r) for r in self._replicas)

    def _occupation_of(self, replica: Replica) -> str:
        if not replica.working_on:
            return f"replica {replica.index} is {'idle' if replica.alive else 'dead'}"
        seconds = time.monotonic() - replica.since
        where = f"process {replica.state.pid} on {replica.state.host}"
        return (
            f"replica {replica.index} works on {replica.working_on} since {seconds:.0f} s"
            f" (actor {self._actor_name(replica.index, 0)},"
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
            logger.warning(
                "run %s: %s is waited for since %.0f s: pool %r: %s",
                self.spec.run,
                what,
                now - started,
                self.name,
                self._occupation(),
            )

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
            results = await self._gather(last, timeout_s, waiting_for)
        except NoAnswerError:
            # What it does is unknown; only a new process is known to be idle.
            self._kill(replica.ranks)
            self._count_death(replica, what, suspect=suspect)
            raise
        except _DEAD as e:
            self._count_death(replica, what, suspect=suspect)
            raise ReplicaDiedError(
                f"replica {replica.index} of pool {self.name!r} died during {what}: {_last_line(e)}"
            ) from e
        except _LOST as e:
            raise NotBegunError(f"an input of {what} was lost: {_last_line(e)}") from e
        return [*answers[0][:-1], results[0]] if num_returns > 1 else results[0]

    def _count_death(self, replica: Replica, what: str, *, suspect: bool) -> None:
        replica.alive = False
        if not suspect:
            self._deaths.append(what)

    def excuse(self, what: str) -> None:
        """Takes back the deaths that happened on `what`: a sample was found to be their cause."""
        self._deaths = [w for w in self._deaths if w != what]

    async def _replace(self, dead: Replica) -> None:
        if len(self._deaths) > self.max_restarts:
            raise PoolError(
                f"pool {self.name!r}: its replicas died {len(self._deaths)} times within one phase,"
                f" more than runtime.max_replica_restarts={self.max_restarts}: look into the"
                f" worker logs of Ray for the cause; the last was during {self._deaths[-1]}"
            )
        logger.warning("replica %d of pool %r is replaced", dead.index, self.name)
        if self.check_fence is not None:
            await asyncio.to_thread(self.check_fence)
        await self.rebuild(dead)

    def begin_phase(self) -> None:
        """Deaths are counted per phase."""
        self._deaths.clear()

    async def rebuild(self, replica: Replica) -> None:
        """A new process in place of the replica's: a module as its `setup` leaves it."""
        await self._end(replica.index, replica.ranks)
        fresh = await self._create(replica.index)
        replica.ranks, replica.state, replica.alive = fresh.ranks, fresh.state, True

    async def heartbeat(self) -> None:
        """Keeps the lease of idle replicas; a busy one keeps its own."""
        for replica in self._replicas:
            if not replica.working_on:
                self.tell(replica, "heartbeat")

    # ---- waiting --------------------------------------------------------------------------

    async def _await(self, ref: Any, timeout_s: float, waiting_for: str) -> Any:
        (result,) = await self._gather([ref], timeout_s, waiting_for)
        return result

    @staticmethod
    async def _gather(refs: Sequence[Any], timeout_s: float, waiting_for: str) -> list[Any]:
        """All results; the first failure at once, unwrapped from what Ray makes of it."""
        try:
            async with asyncio.timeout(timeout_s):
                return list(await asyncio.gather(*refs))
        except RayTaskError as e:  # before TimeoutError, which it also is where a task raised one
            cause = e.cause
            if isinstance(cause, Exception) and not isinstance(cause, RayTaskError):
                raise cause from e
            raise
        except TimeoutError as e:
            raise NoAnswerError(f"waited {timeout_s:g} s for {waiting_for}") from e


def _living(namespace: str) -> set[str]:
    return {
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace
    }


def _import_path() -> str:
    """Where this process imports from beside its installation: the user's own code."""
    site = tuple(p for p in (sys.prefix, sys.base_prefix) if p)
    own = [os.path.abspath(p) for p in sys.path if p and not os.path.abspath(p).startswith(site)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(p for p in (*own, *inherited) if p))


def _last_line(error: BaseException) -> str:
    """The last line of a message, without what Ray says of deaths in general."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
