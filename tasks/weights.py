"""Where the weights of a policy version are, and how a replica gets to them.

From the trainer, while it holds that version and is at rest, else from the store. Knows nothing of
plans and samples.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import NotBegunError, PoolError, StoreDamageError, SyncError
from rlhf_flows.pools import CheckpointRecord, Pool, Replica, WeightsSource
from rlhf_flows.store import ObjectStore, RunLayout, read_json

__all__ = ["RunWeights", "SyncPair"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPair:
    """A trained module, and one that samples with its weights."""

    source: str
    target: str
    eta: float | None = None
    """The target holds a moving average of the weights, with this share of the newest; None for
    the weights themselves.
    """

    @property
    def average(self) -> str:
        """The name of the average that the target follows; "" for the weights themselves."""
        return "" if self.eta is None else self.target


class RunWeights:
    """The commits of one run, and the replicas that are to hold what they made."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        run: str,
        attempt: int,
        store: ObjectStore,
        pools: Mapping[str, Pool],
        trained: frozenset[str],
        syncs: Sequence[SyncPair],
        deleted: Collection[str],
    ) -> None:
        """
        Args:
            trained: Names of the trained modules.
            deleted: Prefixes of folders that retention deleted, or began to.
        """
        self.commits: dict[int, dict[str, Any]] = {}
        """Payload of `trained.json`, by the policy version it made."""
        self.gone: set[str] = set(deleted)
        """Prefixes of folders that retention deleted."""
        self._settings = config.runtime
        self._run, self._attempt, self._store = run, attempt, store
        self._layout = RunLayout(run)
        self._pools, self._trained, self._syncs = pools, trained, syncs
        self._sending: dict[tuple[str, str, int], asyncio.Future[Any]] = {}

    def versions_without_weights(self) -> set[int]:
        """Trained versions whose weights retention has deleted, or began to."""
        versions = (self._layout.version_of_weights(prefix) for prefix in self.gone)
        return {version for version in versions if version is not None}

    async def commit_of(self, version: int) -> dict[str, Any]:
        """The payload of the commit that made `version` (1 or more)."""
        if version not in self.commits:
            key = self._layout.trained(version - 1)
            self.commits[version] = await asyncio.to_thread(read_json, self._store, key)
        return self.commits[version]

    async def checkpoint_of(self, module: str, version: int) -> CheckpointRecord:
        commit = await self.commit_of(version)
        try:
            return CheckpointRecord.from_json(commit["checkpoints"][module])
        except KeyError as e:
            raise StoreDamageError(
                f"the commit of version {version} of run {self._run!r} names no checkpoint of"
                f" {module!r}: it was written by another configuration"
            ) from e

    async def followed(self, pair: SyncPair, version: int) -> CheckpointRecord:
        """What the target of a pair holds at `version`: weights alone, or their average."""
        record = await self.checkpoint_of(pair.source, version)
        if not pair.average:
            return replace(record, state=None)
        if pair.average not in record.averages:
            raise StoreDamageError(
                f"the commit of version {version} of run {self._run!r} has no average of"
                f" {pair.source!r} for {pair.target!r}: it was written by another configuration"
            )
        return record.averages[pair.average]

    def pair_of(self, target: str) -> SyncPair:
        """The pair by which `target` follows a trained module."""
        for pair in self._syncs:
            if pair.target == target:
                return pair
        raise PoolError(
            f"module {target!r} is asked for a policy version, but follows no trainer: say which"
            f" with engine.set_parameter_sync(trainer, {target})"
        )

    async def weights_of(self, pair: SyncPair, version: int) -> WeightsSource | None:
        """What the target of a pair holds at `version`, as Ray objects, if the trainer holds that
        version and is at rest.
        """
        module = pair.source
        key = (module, pair.average, version)
        if module not in self._pools:
            return None
        if key not in self._sending:
            (replica,) = self._pools[module].replicas
            state, busy = replica.state, bool(replica.working_on)
            if not replica.alive or busy or not state.clean or state.version != version:
                return None
            # Packed once, whoever asks while it is being packed.
            sending = self._pools[module].call(
                "send_weights",
                self._attempt,
                version,
                self._settings.sync_bucket_bytes,
                pair.average,
                what=f"packing the weights of version {version}",
                timeout_s=self._settings.sync_timeout_s,
            )
            self._sending[key] = asyncio.ensure_future(sending)
            self._sending[key].add_done_callback(lambda _: self._sending.pop(key, None))
        source: WeightsSource | None = await asyncio.shield(self._sending[key])
        return source

    async def bring_to(self, pool: Pool, replica: Replica, version: int) -> None:
        """Brings one replica of a sampler to a policy version: from the trainer, else the store.

        A failed load leaves an engine in no known state: the replica is then replaced, and loads
        from the store.
        """
        is_trained = pool.name in self._trained
        pair = None if is_trained else self.pair_of(pool.name)
        if version == 0:
            if replica.version != 0:
                await pool.rebuild(replica)
            return
        if pair is None:
            await self._restore_trained(pool, replica, version)
            return
        timeout_s = self._settings.sync_timeout_s
        for is_last in (False, True):
            source = None if is_last else await self.weights_of(pair, version)
            args: tuple[Any, ...]
            if source is not None:
                method, args = "receive_weights", (source, timeout_s)
            else:
                method, args = "restore", (await self.followed(pair, version), version)
            what = f"loading the weights of version {version}"
            try:
                replica.state = await pool.on_replica(
                    replica, method, self._attempt, *args, what=what, timeout_s=timeout_s
                )
            except SyncError as e:
                if is_last:
                    raise
                logger.warning("%s", e)
                await pool.rebuild(replica)
            else:
                return

    async def _restore_trained(self, pool: Pool, replica: Replica, version: int) -> None:
        record = await self.checkpoint_of(pool.name, version)
        if record.state is None:
            raise NotBegunError(
                f"{pool.name!r} is asked for version {version}, which was committed without its"
                " training state: the phase begins again, and trains it back to there first"
            )
        replica.state = await pool.on_replica(
            replica,
            "restore",
            self._attempt,
            record,
            version,
            what=f"restoring version {version}",
            timeout_s=self._settings.setup_timeout_s,
        )
