"""Folders of a module whose ranks hold different parts: all write, one speaks.

The decision here: what is done together is done in steps, and after each all ranks know whether all
of them could. A rank that fails where the others wait for it takes part to the end of the step, so
nobody is left in a collective; then every rank raises what went wrong.

Weights are gathered once, for the digest and for the export that rank 0 writes as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from rlhf_flows.errors import PoolError, RlhfFlowsError, SiblingFailedError
from rlhf_flows.pools.digest import (
    DigestedTensor,
    WeightsDigest,
    digest_tensor,
    dtype_name,
    tensor_bytes,
)
from rlhf_flows.pools.messages import CheckpointRecord
from rlhf_flows.pools.module_folders import ModuleFolders, Saving, read_safetensors
from rlhf_flows.store import FolderRecord, fetch_folder, upload_folder

__all__ = ["ShardedFolders", "joined"]

Result = TypeVar("Result")
_WAIT_S = 0.5
"""Between two looks whether all are done: well below any timeout of a collective."""


class ShardedFolders(ModuleFolders):
    """As `ModuleFolders`, of a sharded module (`BaseModule.is_sharded`)."""

    def save(self, version: int, *, with_state: bool) -> CheckpointRecord:
        """Collective: every rank, same order. The record is the same on all of them."""
        with self.begin(version, with_state=with_state) as saving:
            self._wait_for_all(saving.uploads)
            return joined(self._all(saving.result))

    def begin(self, version: int, *, with_state: bool) -> Saving:
        """Collective: every rank, same order. What is left needs no other rank: `joined` makes one
        record of what they wrote.
        """
        started = time.perf_counter()
        # One name for what all ranks write; it is the first that counts.
        unique = str(self._all(lambda: uuid4().hex)[0])
        with ExitStack() as within:
            folder = within.enter_context(self._store.working_folder())
            beside = within.enter_context(ThreadPoolExecutor(2, "checkpoint"))
            export = _Export()
            self._all(lambda: self._export(export, folder / "weights"))
            name = f"{self._module.name}-{unique}"
            prefix = self._layout.weights_prefix(version, name)
            weights = beside.submit(self._upload, prefix, folder / "weights")
            self.digested = {"": export.each}
            state = None
            if with_state:
                self._all(lambda: self._write_state(version, folder / "state", export))
                prefix = self._layout.checkpoint_prefix(version, name)
                state = beside.submit(self._upload_part, prefix, folder / "state")
            paths: dict[str, Path] = {}
            averages = self._all(lambda: self._averages_of(export, folder / "weights", paths))[0]
            uploads = {}
            for follower, path in paths.items():
                prefix = self._prefix_of_average(follower, version, unique)
                uploads[follower] = beside.submit(self._upload, prefix, path)
            self.digested = self._all(lambda: self.digested)[0]
            probe = self._all(lambda: self._probe(export.dtype))[0]
            record = CheckpointRecord(
                module=self._module.name,
                digest=self._all(lambda: export.digest)[0],
                weights=None,
                state=None,
                probe=probe,
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

    def load(self, record: CheckpointRecord) -> None:
        """Collective: every rank, same order. Each takes its part, and fetches what it reads."""
        assert record.weights is not None
        with (
            self._store.working_folder() as folder,
            ThreadPoolExecutor(1, "restore") as beside,
        ):
            fetching = [beside.submit(self._fetch, record.weights, folder / "weights")]
            if record.state is not None:
                fetching.append(beside.submit(self._fetch_state, record.state, folder / "state"))
            self._wait_for_all(fetching)
            self._all(lambda: [fetched.result() for fetched in fetching])
            weights = read_safetensors(folder / "weights")
            self._all(lambda: self._module.load_weights(weights))
            if record.state is not None:
                self._all(lambda: self._load_state(folder / "state"))

    # ---- steps, on one rank ---------------------------------------------------------------

    def _export(self, export: _Export, folder: Path) -> None:
        """Collective. Rank 0 writes the weights as they come; the others take part."""
        weights = self._module.named_weights()
        if not self._uploads:
            for _, tensor in weights:
                export.dtype = export.dtype or tensor.dtype
            return
        try:
            folder.mkdir()
            self._module.export_weights(export.watched(weights), folder)
        finally:
            for _ in weights:  # a rank that leaves in the middle would be waited for
                pass

    def _write_state(self, version: int, folder: Path, export: _Export) -> None:
        folder.mkdir()
        self._module.save_state(folder)
        self._averages.save(folder)
        self._module.save_checkpoint(version)
        if self._uploads:
            about = {"module": self._module.name, "version": version, "digest": export.digest}
            (folder / "module.json").write_text(json.dumps(about))

    def _averages_of(
        self, export: _Export, folder: Path, paths: dict[str, Path]
    ) -> dict[str, CheckpointRecord]:
        """Rank 0 keeps them whole: this is no collective.

        Args:
            paths: Takes where each was written.
        """
        records = {}
        for follower in self._averages if self._uploads else ():
            records[follower], paths[follower] = self._average(follower, export.like, folder)
        return records

    def _upload_part(self, prefix: str, folder: Path) -> FolderRecord | None:
        """What this rank wrote of a folder of all ranks."""
        return upload_folder(self._store, prefix, folder)

    def _fetch(self, record: FolderRecord, folder: Path) -> None:
        fetch_folder(self._store, record, folder)

    def _fetch_state(self, record: FolderRecord, folder: Path) -> None:
        """What this rank reads of it."""
        names = {file.name for file in record.files}
        described = {name for name in names if name.endswith(".json")}
        self._fetch(_of(record, described), folder)
        wanted = {*self._module.state_files(folder, sorted(names)), *self._averages.files()}
        self._fetch(_of(record, names & wanted - described), folder)

    def _load_state(self, folder: Path) -> None:
        self._module.load_state(folder)
        self._averages.load(folder)

    # ---- together -------------------------------------------------------------------------

    def _all(self, work: Callable[[], Result]) -> list[Result]:
        """Collective. What `work` gave on each rank. Raises on all ranks where it did on any: on
        one that failed its own error, on others that of the first rank that did.
        """
        result: Result | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # of whatever kind: the others are told, and it is raised
            failure = error
        rank = self._module.rank
        told = None if failure is None else _to_tell(failure, self._module.name, rank)
        found: list[Any] = [(result, told)]
        if torch.distributed.is_initialized():
            found *= torch.distributed.get_world_size()
            try:
                torch.distributed.all_gather_object(found, (result, told))
            except RuntimeError as lost:  # of a rank
                if failure is None:
                    raise
                raise failure from lost  # which was there first
        if failure is not None:
            raise failure
        for _, theirs in found:
            if theirs is not None:
                raise theirs
        return [theirs for theirs, _ in found]

    def _wait_for_all(self, futures: Sequence[Future[Any]]) -> None:
        """Collective. Until they are done on all ranks, failed or not: for as long as it takes, as
        no collective waits for an upload. Who died meanwhile is found.
        """
        while not all(self._all(lambda: not wait(futures, _WAIT_S).not_done)):
            pass


class _Export:
    """What is learnt of weights while they go by."""

    def __init__(self) -> None:
        self.digest = ""
        self.dtype: torch.dtype | None = None
        self.like: dict[str, Tensor] = {}
        """Names and dtypes, in order, without numbers."""
        self.each: list[DigestedTensor] = []

    def watched(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        digest = WeightsDigest()
        for name, tensor in weights:
            self.dtype = self.dtype or tensor.dtype
            self.like[name] = torch.empty(0, dtype=tensor.dtype, device="meta")
            data = tensor_bytes(tensor)
            kind = (name, dtype_name(tensor.dtype), tuple(tensor.shape))
            digest.update(*kind, data)
            self.each.append(DigestedTensor(*kind, digest_tensor(kind, data)))
            yield name, tensor
        self.digest = digest.hexdigest()


def _to_tell(error: Exception, module: str, rank: int) -> Exception:
    """What other ranks raise: errors of this package pickle, others may not."""
    if isinstance(error, RlhfFlowsError):
        return error
    return SiblingFailedError(f"rank {rank} of {module!r} failed ({type(error).__name__}: {error})")


def _of(record: FolderRecord, names: Collection[str]) -> FolderRecord:
    return replace(record, files=tuple(f for f in record.files if f.name in names))


def joined(records: Sequence[CheckpointRecord]) -> CheckpointRecord:
    """What the ranks of a replica wrote, as one: rank 0 speaks, the state is of all who wrote some.

    Raises:
        PoolError: two wrote a file of the same name.
    """
    states = [record.state for record in records if record.state is not None]
    return replace(records[0], state=_one_folder(states) if states else None)


def _one_folder(records: Sequence[FolderRecord]) -> FolderRecord:
    """Of the files that all ranks wrote under one prefix."""
    files = [file for record in records for file in record.files]
    names = [file.name for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise PoolError(
            f"several ranks wrote {sorted(twice)[0]!r} of one training state: save_state of a"
            " sharded module gives each file its rank in the name"
        )
    return FolderRecord(prefix=records[0].prefix, files=tuple(files))
