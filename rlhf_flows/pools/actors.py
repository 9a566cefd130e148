"""The actors of a pool in Ray: found again or started, loaded, ended, by names that say whose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rlhf_flows.errors import (
    PoolError,
    ReplicaDiedError,
    TransientError,
    WaitTimeoutError,
)
from rlhf_flows.modules.rank_group import LOOPBACK
from rlhf_flows.pools.answers import DEAD, gather, last_line
from rlhf_flows.pools.messages import PoolSpec, WorkerState
from rlhf_flows.pools.rooms import PlacementGroup, give_back, rooms, seat, take_room
from rlhf_flows.pools.worker import Worker

__all__ = ["BESIDE", "PoolActors", "Replica", "namespace_of"]

logger = logging.getLogger(__name__)

_ATTACH_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 30.0
_LOADS = 3
"""Times that a replica is started before its deaths while it loads are no accident."""
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
_ONE_ARENA = "glibc.malloc.arena_max=1"
"""An actor that answers beside its work does all of it on a thread that is not the main one (Ray
2.60), and what is kept is the main thread's heap: so all threads use that."""
BESIDE = "beside"
"""The concurrency group of calls that are answered beside the work (`PoolSpec.works_beside`)."""


def namespace_of(run: str) -> str:
    """The Ray namespace of a run's actors."""
    return f"rlhf_flows/{run}"


@dataclass(slots=True, kw_only=True)
class Replica:
    """One copy of the module: an actor for each rank."""

    index: int
    ranks: list[Any]
    state: WorkerState
    """Of rank 0."""
    names: tuple[str, ...]
    """Of the ranks, as messages have them."""
    reattached: bool = False
    """It was found alive."""
    working_on: str = ""
    since: float = field(default_factory=time.monotonic)
    """When it began to work, or to idle."""
    alive: bool = True
    deaths: int = 0
    """While it worked, since it last finished a call; those put down to a sample do not count."""
    unanswered: bool = False
    """Who called it last was cancelled: it may be at work on that still."""

    @property
    def version(self) -> int:
        return self.state.version


class PoolActors:
    """The actors of the replicas of one module."""

    def __init__(
        self,
        spec: PoolSpec,
        *,
        attempt: int,
        setup_timeout_s: float,
        check_fence: Callable[[], None] | None,
    ) -> None:
        """
        Args:
            check_fence: Raises where a newer attempt took over; asked before an actor is started.
        """
        self._spec, self._attempt = spec, attempt
        self._setup_timeout_s = setup_timeout_s
        self._check_fence = check_fence
        self._pool = f"pool {spec.module_name!r}"
        self._namespace = namespace_of(spec.run)
        self._datasets: dict[str, tuple[str, Any, tuple[int, ...]]] = {}

    # ---- found or started -----------------------------------------------------------------

    async def open(self, index: int) -> Replica:
        """The replica, ready: found alive, or started and loaded.

        Raises:
            PoolError: it does not come up; nothing of it is left.
        """
        return await self._find(index) or await self._create(index)

    async def _find(self, index: int) -> Replica | None:
        actors = []
        for rank in range(self._spec.ranks_per_replica):
            with contextlib.suppress(ValueError):
                actors.append(ray.get_actor(self.name_of(index, rank), self._namespace))
        if len(actors) < self._spec.ranks_per_replica:  # a group with a dead rank is no group
            if actors:
                await self._end(index, actors)
            return None
        try:
            waiting_for = f"replica {index} of {self._pool} to finish its last call"
            states = await gather(
                [a.attach.remote(self._attempt) for a in actors],
                _ATTACH_TIMEOUT_S,
                waiting_for,
                ranks=_rank_names(len(actors)),
            )
        except (TransientError, *DEAD):
            states = []
        fits = states and all(s.ready and s.digest == self._spec.digest for s in states)
        if not fits or len({s.version for s in states}) > 1:
            logger.info("replica %d of %s is of another making: rebuilt", index, self._pool)
            await self._end(index, actors)
            return None
        return Replica(
            index=index,
            ranks=actors,
            state=states[0],
            names=_names_of(states),
            reattached=True,
        )

    async def rebuild(self, replica: Replica) -> None:
        """A new process in place of the replica's: a module as its `setup` leaves it."""
        if self._check_fence is not None:  # a newer attempt may have re-attached what is to end
            await asyncio.to_thread(self._check_fence)
        await self._end(replica.index, replica.ranks)
        fresh = await self._create(replica.index)
        replica.ranks, replica.state, replica.alive = fresh.ranks, fresh.state, True
        replica.names = fresh.names
        replica.unanswered = False

    async def _create(self, index: int) -> Replica:
        """Starts a replica and loads its model; anew where its process is killed meanwhile."""
        for left in reversed(range(_LOADS)):
            try:
                return await self._load(index)
            except ReplicaDiedError as e:
                if not left:
                    raise PoolError(
                        f"{self._pool}: the process of replica {index} died {_LOADS} times"
                        f" while it loaded its model ({last_line(e)}): look for memory running"
                        " out, and into Ray's worker logs"
                    ) from e
                logger.warning("%s: it is started again", e)
                await self._wait_for_names(index)
        raise AssertionError("the last load returns or raises")

    async def _load(self, index: int) -> Replica:
        if self._check_fence is not None:
            # A zombie must not take the names of the actors that a newer attempt brings up.
            await asyncio.to_thread(self._check_fence)
        waiting_for = f"{self._pool}, replica {index}, to load its model"
        ranks: list[Any] = []
        try:
            room = await self._room(index)
            for rank in range(self._spec.ranks_per_replica):
                ranks.append(self._start_actor(index, rank, room))
            rendezvous = await self._meet(ranks, index) if len(ranks) > 1 else None
            states = await gather(
                [r.setup.remote(self._attempt, rendezvous) for r in ranks],
                self._setup_timeout_s,
                waiting_for,
                ranks=_rank_names(len(ranks)),
            )
            names = _names_of(states)
            replica = Replica(index=index, ranks=ranks, state=states[0], names=names)
            await self._give_datasets(replica)
        except DEAD as e:
            self._end_load(index, ranks)
            raise ReplicaDiedError(
                f"{self._pool}: the process of replica {index} died while it loaded its"
                f" model ({last_line(e)})"
            ) from e
        except BaseException:  # cancelled as well: half-loaded actors are detached, and would stay
            self._end_load(index, ranks)
            raise
        return replica

    def _end_load(self, index: int, ranks: Sequence[Any]) -> None:
        _kill(ranks)
        self._give_back(index)

    async def _room(self, index: int) -> PlacementGroup | None:
        """For all ranks of a replica that asks for some; an actor alone needs none."""
        if not self._takes_room:
            return None
        spec = self._spec
        needs = {"GPU": spec.num_gpu, "CPU": spec.num_cpu, "memory": spec.memory_bytes}
        return await take_room(
            self._room_of(index),
            {what: float(count) for what, count in needs.items() if count},
            ranks=spec.ranks_per_replica,
            timeout_s=self._setup_timeout_s,
            waiting_for=f"{self._pool}, replica {index}, to start its processes",
        )

    @property
    def _takes_room(self) -> bool:
        spec = self._spec
        return spec.ranks_per_replica > 1 and bool(
            spec.num_gpu or (spec.num_cpu and not spec.is_spread)
        )

    def _room_of(self, index: int) -> str:
        return f"{self._namespace}/{self._spec.module_name}/{index}"

    def _give_back(self, index: int) -> None:
        if self._takes_room:
            give_back({self._room_of(index)})

    async def _meet(self, ranks: Sequence[Any], index: int) -> tuple[str, int]:
        """Where the ranks of a replica find each other, once all of them have started."""
        waiting_for = f"{self._pool}, replica {index}, to start its processes"
        addresses = await gather(
            [r.address.remote() for r in ranks],
            self._setup_timeout_s,
            waiting_for,
            ranks=_rank_names(len(ranks)),
        )
        host = LOOPBACK if len(set(addresses)) == 1 else addresses[0]
        (rendezvous,) = await gather(
            [ranks[0].rendezvous.remote(host)], self._setup_timeout_s, waiting_for
        )
        return rendezvous  # type: ignore[no-any-return]

    def _start_actor(self, index: int, rank: int, room: PlacementGroup | None) -> Any:
        spec = self._spec
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
            tunables = [_CPU_ALLOCATOR, _ONE_ARENA] if spec.works_beside else [_CPU_ALLOCATOR]
            environment["GLIBC_TUNABLES"] = ":".join(tunables)
        strategy = "SPREAD" if spec.is_spread else "DEFAULT"
        actor_class: Any = ray.remote(Worker)
        if spec.works_beside:
            remote: Any = ray.remote  # its types do not know of concurrency groups
            actor_class = remote(concurrency_groups={BESIDE: 1})(Worker)
        return actor_class.options(
            name=self.name_of(index, rank),
            namespace=self._namespace,
            lifetime="detached",
            num_cpus=spec.num_cpu,
            num_gpus=spec.num_gpu,
            memory=spec.memory_bytes or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy if room is None else seat(room, rank),
            runtime_env={**spec.runtime_env, "env_vars": environment},
        ).remote(spec, replica=index, rank=rank, is_leased=True)

    async def _end(self, index: int, actors: Sequence[Any]) -> None:
        """Ends actors and waits until their names are free."""
        _kill(actors)
        await self._wait_for_names(index)

    async def _wait_for_names(self, index: int) -> None:
        deadline = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < deadline:
            names = {self.name_of(index, r) for r in range(self._spec.ranks_per_replica)}
            if not names & _living(self._namespace):
                return
            await asyncio.sleep(0.05)
        raise WaitTimeoutError(
            f"{self._pool}: the actors of replica {index} did not end within {_END_TIMEOUT_S:g} s"
        )

    def drop_surplus(self) -> None:
        """Ends replicas of an earlier attempt that had more of them."""
        mine = {
            self.name_of(i, r)
            for i in range(self._spec.num_replica)
            for r in range(self._spec.ranks_per_replica)
        }
        self._end_named(_living(self._namespace) - mine)
        if self._spec.ranks_per_replica > 1:
            give_back(self._rooms() - {self._room_of(i) for i in range(self._spec.num_replica)})

    def release(self) -> None:
        """Ends every actor of the pool, and frees what they held.

        Raises:
            FencedError: they are a newer attempt's by now; nothing was ended.
        """
        if self._check_fence is not None:
            self._check_fence()
        self._end_named(_living(self._namespace))
        give_back(self._rooms())

    def _end_named(self, names: Iterable[str]) -> None:
        for name in names:
            if name.startswith(f"{self._spec.module_name}/"):
                with contextlib.suppress(ValueError):
                    _kill([ray.get_actor(name, self._namespace)])

    @staticmethod
    def kill(replica: Replica) -> None:
        """Ends its processes; nothing waits for it."""
        _kill(replica.ranks)

    def drop(self, replica: Replica) -> None:
        """Ends its processes, and what is reserved for them."""
        self._end_load(replica.index, replica.ranks)

    def end_group(self, replica: Replica) -> None:
        """Ends what is left of a replica whose ranks cannot go on together: it is replaced before
        it is given work."""
        self.kill(replica)
        replica.alive = False

    def _rooms(self) -> set[str]:
        return rooms(f"{self._namespace}/{self._spec.module_name}/")

    def name_of(self, index: int, rank: int) -> str:
        return f"{self._spec.module_name}/{index}/{rank}"

    # ---- datasets -------------------------------------------------------------------------

    async def set_dataset(
        self,
        kind: str,
        digest: str,
        rows: Sequence[Any],
        parts: Sequence[int],
        replicas: Sequence[Replica],
    ) -> tuple[int, ...]:
        """These replicas build the dataset of `rows` unless they have it, and all later ones.

        Returns the number of its items, of each part where there are `parts`.
        """
        self._datasets[kind] = (digest, ray.put(rows), tuple(parts))
        sizes = await asyncio.gather(*(self._give_dataset(r, kind) for r in replicas))
        return sizes[0]

    async def _give_datasets(self, replica: Replica) -> None:
        for kind in self._datasets:
            await self._give_dataset(replica, kind)

    async def _give_dataset(self, replica: Replica, kind: str) -> tuple[int, ...]:
        digest, rows, parts = self._datasets[kind]
        for known, its_digest, sizes in replica.state.datasets:
            if (known, its_digest) == (kind, digest):
                return sizes
        building = [
            r.load_dataset.remote(self._attempt, kind, digest, rows, parts) for r in replica.ranks
        ]
        waiting_for = f"{self._pool} to build the {kind} dataset"
        try:
            found = await gather(
                building,
                self._setup_timeout_s,
                waiting_for,
                ranks=replica.names,
                on_torn=lambda: self.end_group(replica),
            )
        except DEAD as e:
            raise ReplicaDiedError(
                f"{self._pool}: the process of replica {replica.index} died while it built the"
                f" {kind} dataset ({last_line(e)})"
            ) from e
        return tuple(found[0])


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor, no_restart=True)


def _rank_names(count: int) -> tuple[str, ...]:
    return tuple(f"rank {rank}" for rank in range(count))


def _names_of(states: Sequence[WorkerState]) -> tuple[str, ...]:
    return tuple(f"rank {r} (process {s.pid} on {s.host})" for r, s in enumerate(states))


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
