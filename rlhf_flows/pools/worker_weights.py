"""The weights of a worker: which version its module holds, how it leaves, how another comes.

To the store and from there, and bucket by bucket from trainer to follower. A module in the middle
of a load is at no version. Plain Python, as the worker: Ray moves the buckets, and is not known
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_flows.errors import NotBegunError, RlhfFlowsError, SyncError
from rlhf_flows.modules.base import BaseModule, TakeWeights
from rlhf_flows.pools.averages import WeightAverages
from rlhf_flows.pools.digest import DigestedTensor, digest_weights
from rlhf_flows.pools.messages import CheckpointRecord
from rlhf_flows.pools.module_folders import ModuleFolders, Saving
from rlhf_flows.pools.transport import Bucket, Manifest, cut, pack, unpack

__all__ = ["HeldVersion", "WorkerWeights"]


@dataclass(slots=True)
class HeldVersion:
    """What a worker's module holds."""

    version: int = 0
    """-1 in the middle of a load, and after one that failed."""
    clean: bool = True
    """Nothing was trained since that version was committed."""
    trained: int = -1
    """The version that the last training led to, until its commit is known; -1 for none."""
    is_written: bool = False
    """The files of that one are written: training may go on from it before its commit."""

    def is_clean_at(self, version: int) -> bool:
        return self.clean and self.version == version

    def can_train_on(self, version: int) -> bool:
        return self.is_clean_at(version) or (self.is_written and self.trained == version)

    def hold(self, version: int) -> None:
        self.version, self.clean = version, True
        self.trained, self.is_written = -1, False

    def leave(self) -> None:
        self.clean = False
        self.trained, self.is_written = -1, False


@dataclass(frozen=True, slots=True)
class _Digested:
    digest: str
    """sha256 of all, as in commits."""
    tensors: tuple[DigestedTensor, ...]


class WorkerWeights:
    """Of the module of one worker."""

    def __init__(
        self,
        held: HeldVersion,
        module: BaseModule,
        averages: WeightAverages,
        folders: ModuleFolders,
    ) -> None:
        self._held, self._module = held, module
        self._averages, self._folders = averages, folders
        self._digested: dict[str, _Digested] = {}
        """Of the weights (""), or of the average that a module follows, by its name; where they
        were digested since they last changed. On every rank alike: it decides what is collective.
        """
        self._incoming: _Incoming | None = None
        self._saving: tuple[int, Saving] | None = None
        """The version whose files are written and on their way."""

    # ---- to the store and from there ------------------------------------------------------

    def checkpoint(self, version: int, *, with_state: bool) -> CheckpointRecord:
        """Collective: every rank, same order. Rank 0 uploads."""
        record = self._folders.save(version, with_state=with_state)
        self._take_digests(record)
        return record

    def write_checkpoint(self, version: int, *, with_state: bool) -> None:
        """The same in two parts: when this returns, training may go on. One is on its way at most:
        what is left of another is let go of, as that is nobody's any more.

        Collective: every rank, same order.
        """
        before, self._saving = self._saving, None
        if before is not None:
            before[1].abandon()
        saving = self._folders.begin(version, with_state=with_state)
        self._saving = version, saving
        self._take_digests(saving.record)
        self._held.is_written = self._held.trained == version

    def uploaded(self, version: int) -> CheckpointRecord:
        """The record of what this rank wrote, once it is in the store. On any thread: neither the
        module nor its process group is asked.

        Raises:
            NotBegunError: nothing of that version is on its way.
        """
        saving, self._saving = self._saving, None
        if saving is None or saving[0] != version:
            raise NotBegunError(
                f"{self._module.name!r} has no files of version {version} to upload: the process"
                " that wrote them is gone; the episode is trained again"
            )
        with saving[1] as files:
            return files.result()

    def _take_digests(self, record: CheckpointRecord) -> None:
        each = self._folders.digested
        self._digested = {n: _Digested(d, tuple(each[n])) for n, d in record.digests.items()}

    def restore(self, record: CheckpointRecord, version: int) -> None:
        self._let_go()
        with self._as_sync_error(version):
            self._folders.load(record)
        self._held.hold(version)

    def digests(self) -> dict[str, str]:
        """Of the weights (""), and of their average for each module that follows one.

        Collective: every rank, same order.
        """
        return {name: self._digest(name).digest for name in ("", *self._averages)}

    def _digest(self, average: str) -> _Digested:
        if average not in self._digested:
            each: list[DigestedTensor] = []
            digest = digest_weights(self._weights(average), each)
            found = [_Digested(digest, tuple(each))]
            if self._module.is_sharded and torch.distributed.is_initialized():
                # Averages are whole on rank 0 alone.
                torch.distributed.broadcast_object_list(found, 0)
            (self._digested[average],) = found
        return self._digested[average]

    # ---- from trainer to follower ---------------------------------------------------------

    def stream(
        self, version: int, bucket_bytes: int, average: str, committed: str, *, packs: bool
    ) -> Iterator[Bucket]:
        """The weights in buckets; nothing where training has moved on already.

        Collective: every rank, same order, to its end.

        Args:
            average: The module whose average is wanted; "" for the weights themselves.
            committed: Digest that they must have.
            packs: This rank speaks for its replica; the others yield nothing.
        """
        if not self._held.is_clean_at(version):
            return
        digested = self._digest(average)
        if digested.digest != committed:
            raise SyncError(
                f"{self._module.name!r} holds weights with digest {digested.digest[:12]} as version"
                f" {version}, committed was {committed[:12]}: nothing was sent"
            )
        if not packs:
            for _ in self._weights(average):
                pass
            return
        manifest = Manifest(
            version=version,
            digest=committed,
            tensors=digested.tensors,
            buckets=cut(digested.tensors, bucket_bytes),
        )
        try:
            yield from pack(self._weights(average), manifest)
        except RlhfFlowsError:
            raise
        except Exception as e:
            raise SyncError(
                f"{self._module.name!r} failed while it gave its weights of version {version}"
                f" ({type(e).__name__}: {e})"
            ) from e

    def receive(self, bucket: Bucket) -> None:
        """Loads a bucket. The first begins, and the last makes the version be held."""
        if bucket.manifest is not None:
            self._let_go()
            self._incoming = _Incoming(self._module, bucket.manifest)
        incoming = self._incoming
        if incoming is None or bucket.index != incoming.next_index:
            expected = "the first" if incoming is None else f"number {incoming.next_index}"
            raise SyncError(
                f"{self._module.name!r} was given bucket {bucket.index} of some weights, expected"
                f" was {expected}: the sync begins again"
            )
        version = incoming.manifest.version
        try:
            with self._as_sync_error(version):
                is_whole = incoming.take(bucket)
        except BaseException as e:
            self._let_go(e)
            raise
        if is_whole:
            self._incoming = None
            self._held.hold(version)

    def changed(self) -> None:
        """The weights are not what was digested last."""
        self._digested = {}

    # ---- inside ---------------------------------------------------------------------------

    def _weights(self, average: str) -> Iterator[tuple[str, Tensor]]:
        own = self._module.named_weights()
        return self._averages.weights(average, own) if average else own

    def _let_go(self, why: BaseException | None = None) -> None:
        """The module is at no version from here on, and of what was on its way no more comes."""
        self._held.leave()
        self._held.version = -1
        self.changed()
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.end(why or SyncError("the rest of the weights did not come"))

    @contextlib.contextmanager
    def _as_sync_error(self, version: int) -> Iterator[None]:
        try:
            yield
        except RlhfFlowsError:
            raise
        except Exception as e:
            raise SyncError(
                f"{self._module.name!r} failed to load version {version}"
                f" ({type(e).__name__}: {e}): the replica is to be replaced"
            ) from e


class _Incoming:
    """Weights that a module is in the middle of taking."""

    def __init__(self, module: BaseModule, manifest: Manifest) -> None:
        self.manifest = manifest
        self.next_index = 0
        self._module = module
        self._within = contextlib.ExitStack()
        self._take: TakeWeights | None = None

    def take(self, bucket: Bucket) -> bool:
        """Whether these were the last."""
        weights = unpack(bucket, self.manifest)
        if self._take is None:
            kinds = [tensor.kind for tensor in self.manifest.tensors]
            self._take = self._within.enter_context(self._module.receiving_weights(kinds))
        self._take(weights)
        self.next_index += 1
        is_whole = self.next_index == len(self.manifest.buckets)
        if is_whole:
            self._within.close()
        return is_whole

    def end(self, why: BaseException) -> None:
        """Before they are whole."""
        with contextlib.suppress(Exception):  # that of the module, after the one that counts
            self._within.__exit__(type(why), why, why.__traceback__)
