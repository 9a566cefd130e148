"""`Worker`: one rank of one module, in a process of its own, until its lease ends.

A worker refuses calls of an older attempt (the fence), reads what it needs and writes its shards
to the store itself, and returns a small report beside the batch. It is plain Python, so that it
can be tested without Ray; `Pool` makes actors of it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import json
import logging
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import numpy as np
import torch

from rlhf_flows.data import (
    Batch,
    align,
    batch_size,
    collate,
    concat,
    keep_samples,
    select,
    to_arrow,
)
from rlhf_flows.errors import (
    DataError,
    FencedError,
    NonFiniteError,
    PoolError,
    RlhfFlowsError,
    ShardError,
    SyncError,
    UserError,
)
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.pools.digest import digest_weights, dtype_name
from rlhf_flows.pools.messages import (
    SOURCE,
    CheckpointRecord,
    ForwardCall,
    NodeReport,
    PoolSpec,
    Probe,
    Source,
    TrainCall,
    TrainRows,
    WeightsSource,
    WorkerState,
)
from rlhf_flows.pools.shards import ShardStore, merge, metrics_of, previews_of
from rlhf_flows.pools.transport import ObjectStoreTransport
from rlhf_flows.store import (
    FolderRecord,
    RunLayout,
    check_fence,
    fetch_folder,
    open_store,
    upload_folder,
)

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 12
_PLAN_COLUMNS = ("sample_id", "group", "sibling", "prompt_row", "seed", "policy_version")


class Worker:
    """One rank of one module. Methods run one at a time, in the order they arrive."""

    def __init__(self, spec: PoolSpec, *, replica: int = 0, rank: int = 0) -> None:
        logging.basicConfig(level=spec.log_level)
        self._spec = spec
        self._replica, self._rank = replica, rank
        self._layout = RunLayout(spec.run)
        self._store = open_store(spec.store_url, retry_budget_s=spec.store_retry_budget_s)
        self._shards = ShardStore(self._store)
        self._attempt = 0
        self._version = 0
        self._clean = True
        self._ready = False
        self._datasets: dict[str, tuple[str, Any]] = {}
        self._episode: _EpisodeTraining | None = None
        self._sent: WeightsSource | None = None
        self._digest: str | None = None
        """Of the weights, where it was made since they last changed."""
        self._transport = ObjectStoreTransport()
        self._last_call = time.monotonic()
        self._busy = False
        self._module: BaseModule = cloudpickle.loads(spec.module)
        threading.Thread(target=self._watch_lease, daemon=True, name="lease").start()

    # ---- life -----------------------------------------------------------------------------

    def _watch_lease(self) -> None:
        while True:
            time.sleep(min(10.0, self._spec.lease_s / 4))
            idle_s = time.monotonic() - self._last_call
            if not self._busy and idle_s > self._spec.lease_s:
                logger.warning("no attempt called for %.0f s: the lease is over", idle_s)
                os._exit(0)

    def _enter(self, attempt: int) -> None:
        self._last_call = time.monotonic()
        if attempt < self._attempt:
            raise FencedError(
                f"attempt {attempt} of run {self._spec.run!r} was taken over by attempt"
                f" {self._attempt}: this one stops, the newer one goes on"
            )
        self._attempt = attempt

    def setup(self, attempt: int, rendezvous: tuple[str, int] | None = None) -> WorkerState:
        """Loads the model. Collective where a replica has several ranks: every rank."""
        self._enter(attempt)
        # A new process knows of no attempt; the store does.
        check_fence(self._store, self._spec.run, attempt)
        self._busy = True
        try:
            context = self._spec.context
            torch.set_num_threads(context.num_threads)
            if self._spec.ranks_per_replica > 1:
                assert rendezvous is not None
                self._join_group(rendezvous)
            self._seed("setup")
            self._module.attach(self._placed(context))
            self._module.setup()
            # What a model loads stays: no collection needs to walk through it again.
            gc.collect()
            gc.freeze()
            self._ready = True
        finally:
            self._leave()
        return self.state()

    def _placed(self, context: Any) -> Any:
        from dataclasses import replace

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
        backend = "nccl" if self._spec.num_gpu and torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend,
            init_method=f"tcp://{host}:{port}",
            rank=self._rank,
            world_size=self._spec.ranks_per_replica,
        )

    def rendezvous(self) -> tuple[str, int]:
        """An address of rank 0 for the process group of its replica."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

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
            version=self._version,
            clean=self._clean,
            datasets=tuple((kind, digest) for kind, (digest, _) in self._datasets.items()),
        )

    def heartbeat(self, attempt: int) -> None:
        self._enter(attempt)

    def load_dataset(self, attempt: int, kind: str, digest: str, rows: Sequence[Any]) -> int:
        """Builds the dataset of the flow that starts with this module; returns its length."""
        self._enter(attempt)
        dataset = self._module.build_dataset(rows, is_eval=kind == "eval")
        self._datasets[kind] = (digest, dataset)
        return len(dataset)

    # ---- forward --------------------------------------------------------------------------

    def forward(self, call: ForwardCall, *tables: Any) -> tuple[Any, Any, NodeReport]:
        """One node on one shard: (its table, the source's where asked for, what was done).

        The table of the node that commits holds what the shard's file holds, no more.
        """
        self._enter(call.attempt)
        self._busy = True
        try:
            batches = [keep_samples(self._shards.load(t), call.samples) for t in tables]
            return self._forward(call, batches)
        finally:
            self._leave()

    def _forward(self, call: ForwardCall, batches: list[Batch]) -> tuple[Any, Any, NodeReport]:
        started = time.perf_counter()
        if call.version is not None and call.version != self._version:
            raise PoolError(
                f"{self._module.name!r} holds policy version {self._version}, shard"
                f" {call.shard} of episode {call.episode} asks for version {call.version}"
            )
        source = None if call.source is None else self._source(call.source)
        inputs = [source if i == SOURCE else batches[i] for i in call.inputs]
        data = merge([b for b in inputs if b is not None])
        rows = batch_size(data)
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
        with _naming_columns(call, self._module.name):
            if call.commit is not None:
                stored = [batches[i] for i in call.merged]
                base = None if call.base is None else batches[call.base]
                table, result, report = self._shards.commit(
                    call, report, source=source, base=base, merged=stored, output=result
                )
            else:
                table = to_arrow(result)
            kept = to_arrow(source) if call.keep_source and source is not None else None
        seconds = time.perf_counter() - started
        report = _replace(
            report, seconds=seconds, metrics=metrics_of(result), previews=previews_of(result)
        )
        return table, kept, report

    def _source(self, source: Source) -> Batch:
        """Dataset rows as the plan orders them; an item is fetched once for all its siblings."""
        _, dataset = self._datasets[source.dataset]
        rows = source.columns["prompt_row"]
        items = {row: dataset[row] for row in dict.fromkeys(rows)}
        samples = [items[row] for row in rows]
        collate_fn = getattr(dataset, "collate_fn", None)
        batch = collate(samples) if collate_fn is None else dict(collate_fn(samples))
        plan = {
            name: list(values) if name == "sample_id" else torch.tensor(values, dtype=torch.int64)
            for name, values in source.columns.items()
        }
        return merge([batch, plan])

    def _call_user(self, call: ForwardCall, data: Batch, rows: int) -> Batch:
        method: Callable[..., Any] = getattr(self._module, call.method)
        options = dict(call.options)
        if "iteration" in inspect.signature(method).parameters:
            options.setdefault("iteration", call.episode)
        size = call.batch_size or rows
        outputs = []
        for start in range(0, rows, max(size, 1)):
            part = data if size >= rows else select(data, range(start, min(start + size, rows)))
            with _naming(
                self._module.name, call.method, call.phase, call.episode, call.shard, part
            ):
                output = method(part, **options)
                outputs.append(_checked(output, part))
        return outputs[0] if len(outputs) == 1 else concat(outputs)

    # ---- training -------------------------------------------------------------------------

    def train(self, call: TrainCall, *tables: Any) -> Mapping[str, float]:
        """One optimizer step. Collective where a replica has several ranks: every rank."""
        self._enter(call.attempt)
        self._busy = True
        try:
            return self._train(call, tables)
        finally:
            self._leave()

    def _train(self, call: TrainCall, tables: Sequence[Any]) -> Mapping[str, float]:
        started = time.perf_counter()
        # First, as a shard may turn out to be damaged: nothing must have happened by then, so that
        # the same call can be made again.
        shards = self._shards_of(call, tables)
        if call.index == 0:
            if not self._clean or self._version != call.version:
                raise PoolError(
                    f"{self._module.name!r} is to train version {call.version}, but it is"
                    f" {'at' if self._clean else 'in the middle of leaving'} version"
                    f" {self._version}: it must be restored first"
                )
            self._episode = _EpisodeTraining(call.episode)
            self._seed(f"training/{call.episode}")
            with _naming(self._module.name, "before_episode", "training", call.episode, 0, None):
                self._module.before_episode(call.episode)
        episode = self._episode
        if episode is None or episode.number != call.episode or episode.done != call.index:
            raise PoolError(
                f"{self._module.name!r} was asked for step {call.index} of episode {call.episode},"
                f" but it is elsewhere: training of the episode starts again"
            )
        self._clean = False
        self._sent = self._digest = None
        episode.shards |= shards
        where = (self._module.name, call.method, "training", call.episode, call.index)
        if call.episode_rows is not None:
            with _naming(*where, None):
                self._prepare_episode(episode, call.episode_rows)
        batch: Batch = {}
        metrics: Mapping[str, float] = {}
        if call.rows:
            if episode.prepared is not None:
                batch = episode.prepared[call.index]
            else:
                with _naming(*where, None):
                    batch = self._module.prepare_batch(episode.rows(call.rows))
            with _naming(*where, batch):
                micro_batches = self._module.micro_batches(batch)
                metrics = getattr(self._module, call.method)(micro_batches, call.iteration) or {}
        episode.done += 1
        if episode.done == call.num_updates:
            with _naming(
                self._module.name, "after_episode", "training", call.episode, call.index, None
            ):
                self._module.after_episode(call.episode)
            self._episode = None
        found = {name: float(value) for name, value in metrics.items()}
        samples = {name: mean for name, (mean, _) in metrics_of(batch).items()}
        seconds = time.perf_counter() - started
        return {**samples, **found, "seconds": seconds, "rows": float(batch_size(batch))}

    def _shards_of(self, call: TrainCall, tables: Sequence[Any]) -> dict[int, Batch]:
        """The shards that come with a call, each merged from its tables."""
        given = iter(tables)
        shards = {}
        for shard, count in call.shards:
            merged = merge(align([self._shards.load(next(given)) for _ in range(count)]))
            shards[shard] = keep_samples(merged, but=call.left_out)
        for shard, source in call.sources:
            shards[shard] = self._source(source)
        return shards

    def _prepare_episode(
        self, episode: _EpisodeTraining, batches: Sequence[tuple[TrainRows, ...]]
    ) -> None:
        """Prepares the batches of the episode that have rows, and shows them to the module."""
        with_rows = [index for index, rows in enumerate(batches) if rows]
        prepared = [self._module.prepare_batch(episode.rows(batches[i])) for i in with_rows]
        shown = self._module.before_updates(prepared) if prepared else []
        episode.prepared = dict(zip(with_rows, shown, strict=True))

    # ---- weights and checkpoints ----------------------------------------------------------

    def checkpoint(self, attempt: int, version: int, with_state: bool) -> CheckpointRecord:
        """Uploads weights and training state under fresh prefixes; a commit makes them real.

        Collective: every rank, same order. Rank 0 uploads.
        """
        self._enter(attempt)
        self._busy = True
        try:
            return self._checkpoint(version, with_state=with_state)
        finally:
            self._leave()

    def _checkpoint(self, version: int, *, with_state: bool) -> CheckpointRecord:
        started = time.perf_counter()
        name = self._module.name
        # Nothing changes the weights meanwhile: hashing and uploading go on beside the rest.
        with (
            self._store.working_folder() as folder,
            ThreadPoolExecutor(2, "checkpoint") as beside,
        ):
            digest = beside.submit(digest_weights, self._module.named_weights())
            (folder / "weights").mkdir()
            self._module.save_pretrained(folder / "weights")
            prefix = self._layout.weights_prefix(version, f"{name}-{uuid4().hex}")
            weights = beside.submit(self._upload, prefix, folder / "weights")
            state = None
            if with_state:
                (folder / "state").mkdir()
                self._module.save_state(folder / "state")
                about = {"module": name, "version": version, "digest": digest.result()}
                (folder / "state" / "module.json").write_text(json.dumps(about))
                prefix = self._layout.checkpoint_prefix(version, f"{name}-{uuid4().hex}")
                state = beside.submit(self._upload, prefix, folder / "state")
            probe = self._take_probe()
            record = CheckpointRecord(
                module=name,
                digest=digest.result(),
                weights=weights.result(),
                state=None if state is None else state.result(),
                probe=probe,
                seconds=time.perf_counter() - started,
            )
        self._digest = record.digest
        return record

    def _upload(self, prefix: str, folder: Path) -> FolderRecord | None:
        return upload_folder(self._store, prefix, folder) if self._rank == 0 else None

    def committed(self, attempt: int, version: int) -> None:
        """The commit that makes the last training real is there."""
        self._enter(attempt)
        self._version, self._clean = version, True

    def restore(self, attempt: int, record: CheckpointRecord, version: int) -> WorkerState:
        """Takes weights, and training state where the record has it, from the store."""
        self._enter(attempt)
        self._busy = True
        try:
            self._clean = False
            self._episode = self._sent = self._digest = None
            with tempfile.TemporaryDirectory(prefix="rlhf-flows-") as temporary:
                folder = Path(temporary)
                assert record.weights is not None
                fetch_folder(self._store, record.weights, folder / "weights")
                self._module.load_weights(_read_safetensors(folder / "weights"))
                if record.state is not None:
                    fetch_folder(self._store, record.state, folder / "state")
                    self._module.load_state(folder / "state")
            self._version, self._clean = version, True
        finally:
            self._leave()
        return self.state()

    def send_weights(self, attempt: int, version: int, bucket_bytes: int) -> WeightsSource | None:
        """The weights of `version` as Ray objects; packed once, whoever asks.

        None where training has moved on already; the store has them, too.
        """
        self._enter(attempt)
        if version != self._version or not self._clean:
            return None
        if self._sent is None or self._sent.version != version:
            self._sent = self._transport.send(
                self._module.named_weights(),
                version=version,
                bucket_bytes=bucket_bytes,
                digest=self._digest,
            )
        return self._sent

    def receive_weights(self, attempt: int, source: WeightsSource, timeout_s: float) -> WorkerState:
        """Loads the weights."""
        self._enter(attempt)
        self._busy = True
        try:
            weights = self._transport.receive(source, timeout_s=timeout_s)
            self._version = -1  # unknown until the load is through
            self._module.load_weights(weights)
            self._version = source.version
        except SyncError:
            raise
        except Exception as e:
            raise SyncError(
                f"{self._module.name!r} failed to load the weights of version {source.version}"
                f" ({type(e).__name__}: {e}): the replica is to be replaced"
            ) from e
        finally:
            self._leave()
        return self.state()

    def probe(self, attempt: int, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._enter(attempt)
        return self._module.probe_logprobs(sequences)

    def _take_probe(self) -> Probe | None:
        """What this model says to token sequences that are the same for every version."""
        size = self._module.vocabulary_size()
        if not size:
            return None
        draws = random.Random(0)
        sequences = tuple(
            tuple(draws.randrange(size) for _ in range(_PROBE_TOKENS))
            for _ in range(_PROBE_SEQUENCES)
        )
        _, first = next(iter(self._module.named_weights()))
        logprobs = tuple(tuple(row) for row in self._module.probe_logprobs(sequences))
        return Probe(sequences=sequences, logprobs=logprobs, dtype=dtype_name(first.dtype))

    def weights_digest(self, attempt: int) -> str:
        self._enter(attempt)
        self._digest = self._digest or digest_weights(self._module.named_weights())
        return self._digest

    # ---- inside ---------------------------------------------------------------------------

    def _leave(self) -> None:
        self._busy = False
        self._last_call = time.monotonic()

    def _seed(self, where: str) -> None:
        """Everything random that user code may use starts from the run, the module and `where`."""
        text = f"{self._spec.context.seed}/{self._module.name}/{self._rank}/{where}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        random.seed(seed)
        np.random.seed(seed)
        if torch.cuda.is_available():
            torch.manual_seed(seed)
        else:  # the same for the CPU, without asking every other kind of device: 1 ms less a call
            torch.default_generator.manual_seed(seed)


class _EpisodeTraining:
    """What a trainer keeps while it trains on one episode."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = 0
        self.shards: dict[int, Batch] = {}
        self.prepared: dict[int, Batch] | None = None
        """By index of the optimizer step, where the module wants the episode."""

    def rows(self, parts: Sequence[TrainRows]) -> Batch:
        """The rows in the order of `parts`: one pass over each shard, however many parts it has."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        position = 0
        for part in parts:
            for row in part.rows:
                wanted.setdefault(part.shard, []).append((position, row))
                position += 1
        batch = concat([select(self.shards[i], [row for _, row in w]) for i, w in wanted.items()])
        if len(wanted) == 1:
            return batch
        came = [position for some in wanted.values() for position, _ in some]
        return select(batch, sorted(range(len(came)), key=came.__getitem__))


class _naming:
    """Names module, method, shard and samples in what user code raises."""

    def __init__(
        self, module: str, method: str, phase: str, episode: int, index: int, batch: Batch | None
    ) -> None:
        unit = f"step {index + 1}" if phase == "training" else f"shard {index}"
        self._where = f"{module}.{method} failed on {phase} of episode {episode}, {unit}"
        ids = [] if batch is None else list(batch.get("sample_id", []))
        self._samples = f" (samples {ids[0]} to {ids[-1]})" if ids else ""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError | NonFiniteError) and not isinstance(error, ShardError):
            raise type(error)(f"{self._where}{self._samples}: {error}") from error
        if isinstance(error, RlhfFlowsError) or not isinstance(error, Exception):
            return
        cause = f"{type(error).__name__}: {error}"
        raise ShardError(f"{self._where}{self._samples}: {cause}") from error


@contextlib.contextmanager
def _naming_columns(call: ForwardCall, module: str) -> Iterator[None]:
    """Names the call whose columns cannot be kept."""
    try:
        yield
    except DataError as e:
        raise DataError(
            f"{module}.{call.method} failed on {call.phase} of episode {call.episode}, shard"
            f" {call.shard}: {e}"
        ) from e


def _checked(output: Any, data: Batch) -> Batch:
    if output is None:
        return {}
    if not isinstance(output, dict):
        raise DataError(
            f"it returned a {type(output).__name__}, expected a dict of columns (or None)"
        )
    rows = batch_size(data)
    if output and batch_size(output) != rows:
        raise DataError(
            f"it returned {batch_size(output)} rows for {rows}: return one row for each sample, in"
            " the same order"
        )
    return output


def _read_safetensors(folder: Path) -> Any:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)


def _replace(report: NodeReport, **changes: Any) -> NodeReport:
    from dataclasses import replace

    return replace(report, **changes)
