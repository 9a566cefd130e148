"""`Worker`: one rank of one module, in a process of its own, until its lease ends.

A worker refuses calls of an older attempt (the fence), reads what it needs and writes its shards
to the store itself, and returns a small report beside the batch. It is plain Python, so that it
can be tested without Ray; `Pool` makes actors of it.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle
import torch

from rlhf_flows.data import (
    Batch,
    EpisodeRelayBuffer,
    align,
    batch_size,
    concat,
    keep_samples,
    relayed,
    select,
    to_arrow,
    to_samples,
)
from rlhf_flows.errors import FencedError, PoolError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.modules.rank_group import (
    LOOPBACK,
    RankGroup,
    hold_store,
    reach_store,
    talk_over,
)
from rlhf_flows.pools.averages import WeightAverages
from rlhf_flows.pools.datasets import Datasets, build
from rlhf_flows.pools.episode_training import EpisodeTraining
from rlhf_flows.pools.messages import (
    RELAYED,
    SOURCE,
    CheckpointRecord,
    ForwardCall,
    NodeReport,
    PoolSpec,
    RelayCall,
    TrainCall,
    WorkerState,
)
from rlhf_flows.pools.module_folders import ModuleFolders
from rlhf_flows.pools.sharded_folders import ShardedFolders
from rlhf_flows.pools.shards import ShardStore, merge, metrics_of, previews_of
from rlhf_flows.pools.transport import Bucket
from rlhf_flows.pools.user_code import (
    call_hook,
    checked_output,
    naming,
    naming_columns,
    seed_everything,
)
from rlhf_flows.pools.worker_weights import HeldVersion, WorkerWeights
from rlhf_flows.store import ObjectStore, RunLayout, check_fence, open_store

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

_PLAN_COLUMNS = ("sample_id", "group", "sibling", "prompt_row", "seed", "policy_version")


class Worker:
    """One rank of one module. Methods run one at a time, in the order they arrive; `uploaded` alone
    may run beside another."""

    def __init__(
        self, spec: PoolSpec, *, replica: int = 0, rank: int = 0, is_leased: bool = False
    ) -> None:
        """
        Args:
            is_leased: The process is this worker's, and ends with its lease.
        """
        logging.basicConfig(level=spec.log_level)
        self._spec = spec
        self._replica, self._rank = replica, rank
        self._attempt = 0
        self._held = HeldVersion()
        self._ready = False
        self._datasets = Datasets()
        self._relayed: Batch = {}
        """What the relay function returned last."""
        self._begun: int | None = None
        """The episode that the module was told of last."""
        self._episode: EpisodeTraining | None = None
        self._last_call = time.monotonic()
        self._busy = False
        self._group: RankGroup | None = None
        """Of the ranks of this replica, where there are several."""
        self._meeting: Any = None
        """The store that rank 0 holds for them."""
        self._room: Any = None
        """What Ray reserves for them."""
        # By `setup`: what a constructor raises, Ray reports as a death.
        self._store: ObjectStore
        self._shards: ShardStore
        self._module: BaseModule
        self._averages: WeightAverages
        self._weights: WorkerWeights
        if is_leased:
            threading.Thread(target=self._watch_lease, daemon=True, name="lease").start()

    # ---- life -----------------------------------------------------------------------------

    def _watch_lease(self) -> None:
        while True:
            time.sleep(min(10.0, self._spec.lease_s / 4))
            idle_s = time.monotonic() - self._last_call
            if not self._busy and idle_s > self._spec.lease_s:
                logger.warning("no attempt called for %.0f s: the lease is over", idle_s)
                self._leave_room()
                os._exit(0)

    @contextlib.contextmanager
    def _working(self, attempt: int, doing: str = "a call") -> Iterator[None]:
        """Around every call that takes its time: the lease does not run out meanwhile, and the
        other ranks of its replica are told what this one is in."""
        self._enter(attempt)
        self._busy = True
        try:
            with contextlib.nullcontext() if self._group is None else self._group.section(doing):
                yield
        finally:
            self._busy = False
            self._last_call = time.monotonic()

    def _enter(self, attempt: int) -> None:
        self._last_call = time.monotonic()
        if attempt < self._attempt:
            raise FencedError(
                f"attempt {attempt} of run {self._spec.run!r} was taken over by attempt"
                f" {self._attempt}: this one stops, the newer one goes on"
            )
        if attempt > self._attempt:
            self._held.trained = -1  # whether that was committed, another attempt cannot know
        self._attempt = attempt

    def setup(self, attempt: int, rendezvous: tuple[str, int] | None = None) -> WorkerState:
        """Loads the model. Collective where a replica has several ranks: every rank."""
        spec = self._spec
        with self._working(attempt, "setup"):
            self._store = open_store(spec.store_url, retry_budget_s=spec.store_retry_budget_s)
            self._shards = ShardStore(self._store)
            # A new process knows of no attempt; the store does.
            check_fence(self._store, spec.run, attempt)
            self._module = _unpickled(spec)
            torch.set_num_threads(spec.context.num_threads)
            if spec.ranks_per_replica > 1:
                assert rendezvous is not None
                self._join_group(rendezvous)
        with self._working(attempt, "setup"):  # anew: from here on there is a group to be told
            self._seed("setup")
            self._module.attach(self._placed(spec.context))
            self._module.setup()
            # Looked at only where there is an eta: most modules train nothing.
            weights = self._module.trained_weights() if spec.averages else ()
            is_sharded = self._module.is_sharded
            self._averages = WeightAverages(
                spec.averages, weights, is_sharded=is_sharded, rank=self._rank
            )
            kind = ShardedFolders if is_sharded else ModuleFolders
            folders = kind(
                self._store,
                RunLayout(spec.run),
                self._module,
                self._averages,
                uploads=self._rank == 0,
            )
            self._weights = WorkerWeights(self._held, self._module, self._averages, folders)
            # What a model loads stays: no collection needs to walk through it again.
            gc.collect()
            gc.freeze()
            self._ready = True
        return self.state()

    def _placed(self, context: Any) -> Any:
        device = "cuda" if self._spec.num_gpu and torch.cuda.is_available() else "cpu"
        return replace(
            context,
            rank=self._rank,
            world_size=self._spec.ranks_per_replica,
            replica=self._replica,
            num_replica=self._spec.num_replica,
            device=device,
        )

    def _join_group(self, rendezvous: tuple[str, int]) -> None:
        host, port = rendezvous
        timeout_s = self._spec.collective_timeout_s
        talk_over(LOOPBACK if host == LOOPBACK else self.address())
        is_cuda = self._spec.num_gpu and torch.cuda.is_available()
        self._group = RankGroup(
            self._meeting or reach_store(host, port, timeout_s=timeout_s),
            rank=self._rank,
            world_size=self._spec.ranks_per_replica,
            collective_timeout_s=timeout_s,
            device="cuda" if is_cuda else "cpu",
        )

    def address(self) -> str:
        """Of this rank's node, as others reach it."""
        import ray

        self._room = ray.util.get_current_placement_group()
        return str(ray.util.get_node_ip_address())

    def _leave_room(self) -> None:
        """What is reserved for the replica would be so for ever."""
        import ray

        if self._room is not None:
            ray.util.remove_placement_group(self._room)

    def rendezvous(self, host: str) -> tuple[str, int]:
        """Rank 0 opens a store for the ranks of its replica, held until this process ends."""
        self._meeting = hold_store(host)
        return host, self._meeting.port

    def attach(self, attempt: int) -> WorkerState:
        """A (new) attempt claims this worker."""
        self._enter(attempt)
        return self.state()

    def state(self) -> WorkerState:
        return WorkerState(
            pid=os.getpid(),
            host=socket.gethostname(),
            digest=self._spec.digest,
            ready=self._ready,
            version=self._held.version,
            clean=self._held.clean,
            trained=self._held.trained,
            datasets=self._datasets.known(),
        )

    def heartbeat(self, attempt: int) -> None:
        self._enter(attempt)

    def load_dataset(
        self, attempt: int, kind: str, digest: str, rows: Sequence[Any], parts: Sequence[int] = ()
    ) -> tuple[int, ...]:
        """Builds the dataset of the flow that starts with this module.

        Returns the number of its items; of each part, where `parts` says how many of the rows
        belong to each of several datasets.
        """
        with self._working(attempt, "the building of a dataset"):
            dataset = build(self._module, rows, parts=parts, is_eval=kind == "eval")
            self._datasets.set(kind, digest, dataset)
            return self._datasets.sizes(kind)

    # ---- forward --------------------------------------------------------------------------

    def forward(self, call: ForwardCall, *tables: Any) -> tuple[Any, Any, NodeReport]:
        """One node on one shard: (its table, the source's where asked for, what was done).

        The table of the node that commits holds what the shard's file holds, no more.
        """
        with self._working(
            call.attempt, f"shard {call.shard} of {call.phase} of episode {call.episode}"
        ):
            batches = [keep_samples(self._shards.load(t), call.samples) for t in tables]
            return self._forward(call, batches)

    def _forward(self, call: ForwardCall, batches: list[Batch]) -> tuple[Any, Any, NodeReport]:
        started = time.perf_counter()
        if call.version is not None and not self._held.is_clean_at(call.version):
            raise PoolError(
                f"{self._module.name!r} holds policy version {self._held.version}, shard"
                f" {call.shard} of episode {call.episode} asks for version {call.version}"
            )
        source = None
        if call.source is not None:
            where = (self._module.name, "dataset", call.phase, call.episode, call.shard)
            with naming(*where, None):
                source = self._datasets.rows(call.source)
        inputs = [source if i == SOURCE else batches[i] for i in call.inputs]
        data = merge([b for b in inputs if b is not None])
        rows = batch_size(data)
        self._begin_episode(call)
        self._seed(f"{call.phase}/{call.episode}/{call.shard}")
        output = self._call_user(call, data, rows)
        plan = {k: data[k] for k in _PLAN_COLUMNS if k in data}
        if self._module.generates and call.version is not None:
            plan["policy_version"] = torch.full((rows,), call.version, dtype=torch.int64)
        result = merge([output, plan])
        report = NodeReport(
            module=self._module.name,
            shard=call.shard,
            rows=rows,
            seconds=time.perf_counter() - started,
        )
        if self._rank:
            return None, None, report  # rank 0 speaks for the replica
        with naming_columns(call, self._module.name):
            if call.commit_key is not None:
                stored = [batches[i] for i in call.merged]
                base = None if call.base is None else batches[call.base]
                table, result, report = self._shards.commit(
                    call, report, source=source, base=base, merged=stored, output=result
                )
            else:
                table = to_arrow(result)
            kept = to_arrow(source) if call.keep_source and source is not None else None
        seconds = time.perf_counter() - started
        report = replace(
            report, seconds=seconds, metrics=metrics_of(result), previews=previews_of(result)
        )
        return table, kept, report

    def _begin_episode(self, call: ForwardCall) -> None:
        if call.phase == "evaluation" or call.episode == self._begun:
            return
        self._begun = call.episode
        self._seed(f"{call.phase}/{call.episode}")
        with naming(self._module.name, "before_episode", call.phase, call.episode, 0, None):
            call_hook(self._module.before_episode, call.episode)

    def _call_user(self, call: ForwardCall, data: Batch, rows: int) -> Batch:
        method: Callable[..., Any] = getattr(self._module, call.method)
        options = dict(call.options)
        if "iteration" in inspect.signature(method).parameters:
            options.setdefault("iteration", call.episode)
        size = call.batch_size or rows
        outputs = []
        for start in range(0, rows, max(size, 1)):
            part = data if size >= rows else select(data, range(start, min(start + size, rows)))
            where = (self._module.name, call.method, call.phase, call.episode, call.shard)
            with naming(*where, part):
                outputs.append(checked_output(method(part, **options), part))
        return outputs[0] if len(outputs) == 1 else concat(outputs)

    # ---- training -------------------------------------------------------------------------

    def relay(self, call: RelayCall, *tables: Any) -> int:
        """Asks the relay function what training of an episode is to take; how many samples."""
        with self._working(call.attempt, f"relay of episode {call.episode}"):
            assert self._spec.relay is not None
            given = iter(tables)
            buffers = []
            for episode, counts in call.episodes:
                shards = [
                    merge(align([self._shards.load(next(given)) for _ in range(count)]))
                    for count in counts
                ]
                kept = [keep_samples(shard, but=call.left_out) for shard in shards]
                buffers.append(EpisodeRelayBuffer(episode, to_samples(concat(kept))))
            self._seed(f"relay/{call.episode}")
            function = cloudpickle.loads(self._spec.relay)
            with naming(self._module.name, "relay", "training", call.episode, 0, None):
                batch = relayed(function, buffers, expected=call.expected)
            self._relayed = batch
            return batch_size(batch)

    def train(self, call: TrainCall, *tables: Any) -> Mapping[str, float]:
        """One optimizer step. Collective where a replica has several ranks: every rank."""
        doing = f"training step {call.index + 1} of episode {call.episode}"
        with self._working(call.attempt, doing):
            return self._train(call, tables)

    def _train(self, call: TrainCall, tables: Sequence[Any]) -> Mapping[str, float]:
        started = time.perf_counter()
        # First, as a shard may turn out to be damaged: nothing must have happened by then, so that
        # the same call can be made again.
        shards = self._shards_of(call, tables)
        if call.rows and call.rows[0].shard == RELAYED:
            shards[RELAYED] = self._relayed
        if call.index == 0:
            if not self._held.can_train_on(call.version):
                raise PoolError(
                    f"{self._module.name!r} is to train version {call.version}, but it is"
                    f" {'at' if self._held.clean else 'in the middle of leaving'} version"
                    f" {self._held.version}: it must be restored first"
                )
            self._seed(f"training/{call.episode}")
            self._episode = EpisodeTraining(self._module, call)
        if self._episode is None or not self._episode.expects(call):
            raise PoolError(
                f"{self._module.name!r} was asked for step {call.index} of episode {call.episode},"
                f" but it is elsewhere: training of the episode starts again"
            )
        self._held.leave()
        self._weights.changed()
        metrics = self._episode.step(call, shards)
        if self._episode.is_over:
            self._episode = None
            self._held.trained = call.episode + 1
            if self._spec.averages:
                self._averages.update(self._module.trained_weights())
        return {**metrics, "seconds": time.perf_counter() - started}

    def _shards_of(self, call: TrainCall, tables: Sequence[Any]) -> dict[int, Batch]:
        """The shards that come with a call, each merged from its tables."""
        given = iter(tables)
        shards = {}
        for shard, count in call.shards:
            merged = merge(align([self._shards.load(next(given)) for _ in range(count)]))
            shards[shard] = keep_samples(merged, but=call.left_out)
        for shard, source in call.sources:
            shards[shard] = self._datasets.rows(source)
        return shards

    # ---- weights and checkpoints ----------------------------------------------------------

    def checkpoint(self, attempt: int, version: int, with_state: bool) -> CheckpointRecord:
        """Uploads weights and training state under fresh prefixes; a commit makes them real.

        Collective: every rank, same order. Rank 0 uploads.
        """
        with self._working(attempt, "a checkpoint"):
            return self._weights.checkpoint(version, with_state=with_state)

    def write_checkpoint(self, attempt: int, version: int, with_state: bool) -> None:
        """The same in two parts: when this returns, the files are written, and training may go on.

        Collective: every rank, same order.
        """
        with self._working(attempt, "a checkpoint"):
            self._weights.write_checkpoint(version, with_state=with_state)

    def uploaded(self, attempt: int, version: int) -> CheckpointRecord:
        """What this rank wrote, once it is in the store. Beside other calls, which it neither waits
        for nor disturbs.
        """
        self._enter(attempt)
        return self._weights.uploaded(version)

    def committed(self, attempt: int, version: int) -> None:
        """The commit that makes the last training real is there. Who has gone on from it, or never
        was there, stays what it is.
        """
        self._enter(attempt)
        if self._held.trained == version:
            self._held.hold(version)

    def restore(self, attempt: int, record: CheckpointRecord, version: int) -> WorkerState:
        """Takes weights, and training state where the record has it, from the store."""
        with self._working(attempt, "a restore"):
            self._episode = None
            self._weights.restore(record, version)
        return self.state()

    def stream_weights(
        self, attempt: int, version: int, bucket_bytes: int, average: str, committed: str
    ) -> Iterator[list[Any]]:
        """The weights of `version`, or their average for the module of that name: each bucket as a
        Ray object, whose reference comes in a list, so that who is given it does not fetch it.

        First in each list is a number: the next item is to be taken once the receivers have loaded
        all but so many of the buckets. A list of it alone is for that: what is loaded is let go of.

        Collective where a replica has several ranks: every rank. Rank 0 yields; nothing where
        training has moved on already: the store has them, too.
        """
        import ray

        with self._working(attempt, "the sending of weights"):
            # Until they are loaded: Ray (2.60) may delete an object whose reference lies in what
            # was yielded, and nowhere else.
            held: deque[Any] = deque()
            for bucket in self._weights.stream(
                version, bucket_bytes, average, committed, packs=self._rank == 0
            ):
                held.append(ray.put(bucket))
                del bucket
                yield [1, held[-1]]
                if len(held) == 2:
                    yield [1]
                    held.popleft()
            yield [0]
            yield [0]

    def receive_bucket(self, attempt: int, bucket: Bucket) -> WorkerState:
        """Loads some of the weights of a version; with the last, that version is held."""
        with self._working(attempt, "the loading of weights"):
            self._episode = None
            self._weights.receive(bucket)
        return self.state()

    def probe(self, attempt: int, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._working(attempt, "a probe"):
            return self._module.probe_logprobs(sequences)

    def weights_digests(self, attempt: int) -> dict[str, str]:
        """Of the weights (""), and of their average for each module that follows one."""
        with self._working(attempt, "the digests of weights"):
            return self._weights.digests()

    def _seed(self, where: str) -> None:
        seed_everything(self._spec.context.seed, self._module.name, self._rank, where)


def _unpickled(spec: PoolSpec) -> BaseModule:
    try:
        module: BaseModule = cloudpickle.loads(spec.module)
    except Exception as e:
        raise PoolError(
            f"module {spec.module_name!r} cannot be made on {socket.gethostname()}"
            f" ({type(e).__name__}: {e}): what its class imports must be installed on every node"
        ) from e
    return module
