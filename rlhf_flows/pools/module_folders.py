"""Weights and training state of one module as folders in the store: saved, and taken from there.

The decision here: once the files are written, the module may change. What is left, the upload,
needs them alone: who wants to train on meanwhile can (`begin`), who does not waits (`save`).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_flows.modules.base import BaseModule
from rlhf_flows.pools.averages import WeightAverages
from rlhf_flows.pools.digest import DigestedTensor, digest_weights, dtype_name
from rlhf_flows.pools.messages import CheckpointRecord, Probe
from rlhf_flows.store import FolderRecord, ObjectStore, RunLayout, fetch_folder, upload_folder

__all__ = ["ModuleFolders", "Saving", "read_safetensors"]

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 12


Upload = Future[FolderRecord | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A checkpoint whose files are written, on its way to the store. They go with its context."""

    record: CheckpointRecord
    """All but the folders of the store."""
    started: float
    """On the clock of `time.perf_counter`."""
    weights: Upload
    state: Upload | None
    averages: dict[str, Upload]
    """By the follower."""
    within: ExitStack
    """The threads that upload, and the folder of the files."""

    def __enter__(self) -> Saving:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.within.__exit__(kind, error, trace)

    @property
    def uploads(self) -> list[Upload]:
        own = [self.weights] if self.state is None else [self.weights, self.state]
        return [*own, *self.averages.values()]

    def result(self) -> CheckpointRecord:
        """Waits until all is in the store. Of a sharded module: what this rank wrote of it."""
        return replace(
            self.record,
            weights=self.weights.result(),
            state=None if self.state is None else self.state.result(),
            averages={
                name: replace(self.record.averages[name], weights=upload.result())
                for name, upload in self.averages.items()
            },
            seconds=time.perf_counter() - self.started,
        )

    def abandon(self) -> None:
        """Nobody wants it any more: the files go once no thread reads them; this does not wait."""
        for upload in self.uploads:
            upload.cancel()
        Thread(target=self.within.close, name="abandoned checkpoint", daemon=True).start()


class ModuleFolders:
    """The folders of one module of one run."""

    def __init__(
        self,
        store: ObjectStore,
        layout: RunLayout,
        module: BaseModule,
        averages: WeightAverages,
        *,
        uploads: bool,
    ) -> None:
        """
        Args:
            averages: Of the module's weights: saved and loaded with it.
            uploads: This rank speaks for its replica; the others take part, and keep nothing.
        """
        self._store, self._layout, self._module = store, layout, module
        self._averages, self._uploads = averages, uploads
        self.digested: dict[str, list[DigestedTensor]] = {}
        """What was saved last, tensor by tensor: the weights ("") and each average by its name."""

    def save(self, version: int, *, with_state: bool) -> CheckpointRecord:
        """Under fresh prefixes: nothing is real before a commit names the record.

        Collective: every rank, same order.
        """
        with self.begin(version, with_state=with_state) as saving:
            return saving.result()

    def begin(self, version: int, *, with_state: bool) -> Saving:
        """The same, without waiting for the uploads: the module may change, the files hold it.

        Collective: every rank, same order.
        """
        started = time.perf_counter()
        name = self._module.name
        self.digested = {"": []}
        # Nothing changes the weights meanwhile: hashing and uploading go on beside the rest.
        with ExitStack() as within:
            folder = within.enter_context(self._store.working_folder())
            beside = within.enter_context(ThreadPoolExecutor(2, "checkpoint"))
            digest = beside.submit(digest_weights, self._module.named_weights(), self.digested[""])
            (folder / "weights").mkdir()
            self._module.save_pretrained(folder / "weights")
            prefix = self._layout.weights_prefix(version, f"{name}-{uuid4().hex}")
            weights = beside.submit(self._upload, prefix, folder / "weights")
            state = None
            if with_state:
                (folder / "state").mkdir()
                self._module.save_state(folder / "state")
                self._averages.save(folder / "state")
                self._module.save_checkpoint(version)
                about = {"module": name, "version": version, "digest": digest.result()}
                (folder / "state" / "module.json").write_text(json.dumps(about))
                prefix = self._layout.checkpoint_prefix(version, f"{name}-{uuid4().hex}")
                state = beside.submit(self._upload, prefix, folder / "state")
            averages, uploads = {}, {}
            for follower in self._averages:
                own = dict(self._module.named_weights())
                averages[follower], path = self._average(follower, own, folder / "weights")
                prefix = self._prefix_of_average(follower, version, uuid4().hex)
                uploads[follower] = beside.submit(self._upload, prefix, path)
            record = CheckpointRecord(
                module=name,
                digest=digest.result(),
                weights=None,
                state=None,
                probe=self._probe(),
                seconds=0.0,
                averages=averages,
            )
            return Saving(
                record=record,
                started=started,
                weights=weights,
                state=state,
                averages=uploads,
                within=within.pop_all(),
            )

    def _average(
        self, follower: str, own: Mapping[str, Tensor], export: Path
    ) -> tuple[CheckpointRecord, Path]:
        """Written beside the export of the weights themselves, which it takes the rest from.

        Args:
            own: The weights themselves, or tensors like them.
        """
        started = time.perf_counter()
        each = self.digested[follower] = []
        path = self._averages.export(follower, own.items(), export)
        record = CheckpointRecord(
            module=follower,
            digest=digest_weights(self._averages.weights(follower, own.items()), each),
            weights=None,
            state=None,
            probe=None,
            seconds=time.perf_counter() - started,
        )
        return record, path

    def _prefix_of_average(self, follower: str, version: int, unique: str) -> str:
        name = f"{self._module.name}-average-{follower}-{unique}"
        return self._layout.weights_prefix(version, name)

    def _upload(self, prefix: str, folder: Path) -> FolderRecord | None:
        return upload_folder(self._store, prefix, folder) if self._uploads else None

    def _probe(self, dtype: torch.dtype | None = None) -> Probe | None:
        """What this model says to token sequences that are the same for every version."""
        size = self._module.vocabulary_size()
        if not size:
            return None
        draws = random.Random(0)
        sequences = tuple(
            tuple(draws.randrange(size) for _ in range(_PROBE_TOKENS))
            for _ in range(_PROBE_SEQUENCES)
        )
        if dtype is None:
            _, first = next(iter(self._module.named_weights()))
            dtype = first.dtype
        logprobs = tuple(tuple(row) for row in self._module.probe_logprobs(sequences))
        return Probe(sequences=sequences, logprobs=logprobs, dtype=dtype_name(dtype))

    def load(self, record: CheckpointRecord) -> None:
        """The module takes the weights, and the training state where the record has it."""
        with self._store.working_folder() as folder:
            assert record.weights is not None
            fetch_folder(self._store, record.weights, folder / "weights")
            self._module.load_weights(read_safetensors(folder / "weights"))
            if record.state is not None:
                fetch_folder(self._store, record.state, folder / "state")
                self._module.load_state(folder / "state")
                self._averages.load(folder / "state")


def read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)
