"""Weights and training state of one module as folders in the store: saved, and taken from there."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from safetensors import safe_open
from torch import Tensor

from rlhf_flows.modules.base import BaseModule
from rlhf_flows.pools.averages import WeightAverages
from rlhf_flows.pools.digest import digest_weights, dtype_name
from rlhf_flows.pools.messages import CheckpointRecord, Probe
from rlhf_flows.store import FolderRecord, ObjectStore, RunLayout, fetch_folder, upload_folder

__all__ = ["ModuleFolders"]

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 12


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

    def save(self, version: int, *, with_state: bool) -> CheckpointRecord:
        """Under fresh prefixes: nothing is real before a commit names the record.

        Collective: every rank, same order.
        """
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
                self._averages.save(folder / "state")
                self._module.save_checkpoint(version)
                about = {"module": name, "version": version, "digest": digest.result()}
                (folder / "state" / "module.json").write_text(json.dumps(about))
                prefix = self._layout.checkpoint_prefix(version, f"{name}-{uuid4().hex}")
                state = beside.submit(self._upload, prefix, folder / "state")
            averages = {name: self._save_average(name, version, folder) for name in self._averages}
            probe = self._probe()
            return CheckpointRecord(
                module=name,
                digest=digest.result(),
                weights=weights.result(),
                state=None if state is None else state.result(),
                probe=probe,
                seconds=time.perf_counter() - started,
                averages=averages,
            )

    def _save_average(self, follower: str, version: int, folder: Path) -> CheckpointRecord:
        """`folder` has the export of the weights themselves."""
        started = time.perf_counter()
        own = dict(self._module.named_weights())
        export = self._averages.export(follower, own.items(), folder / "weights")
        name = f"{self._module.name}-average-{follower}-{uuid4().hex}"
        return CheckpointRecord(
            module=follower,
            digest=digest_weights(self._averages.weights(follower, own.items())),
            weights=self._upload(self._layout.weights_prefix(version, name), export),
            state=None,
            probe=None,
            seconds=time.perf_counter() - started,
        )

    def _upload(self, prefix: str, folder: Path) -> FolderRecord | None:
        return upload_folder(self._store, prefix, folder) if self._uploads else None

    def _probe(self) -> Probe | None:
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

    def load(self, record: CheckpointRecord) -> None:
        """The module takes the weights, and the training state where the record has it."""
        with self._store.working_folder() as folder:
            assert record.weights is not None
            fetch_folder(self._store, record.weights, folder / "weights")
            self._module.load_weights(_read_safetensors(folder / "weights"))
            if record.state is not None:
                fetch_folder(self._store, record.state, folder / "state")
                self._module.load_state(folder / "state")
                self._averages.load(folder / "state")


def _read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)
