"""Where the weights of a policy version are, and how a replica gets to them.

From the trainer, while it holds that version and is at rest, else from the store. Knows nothing of
plans and samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import NotBegunError, PoolError, StoreDamageError
from rlhf_flows.pools import NO_VERSION, CheckpointRecord, Pool, Receiver, Replica, deliver
from rlhf_flows.store import ObjectStore, RunLayout, read_json
from rlhf_flows.together import together

__all__ = ["RunWeights", "SyncPair"]


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

    async def bring_to(self, pool: Pool, replica: Replica, version: int) -> None:
        """Brings one replica to a policy version: a sampler as `bring_all` does, a trained module
        from the store.
        """
        if version == 0:
            if replica.version != 0:
                await pool.rebuild(replica)
        elif pool.name in self._trained:
            await self._restore_trained(pool, replica, version)
        else:
            await self.bring_all(self.pair_of(pool.name), [(pool, replica)], version)

    async def bring_all(self, pair: SyncPair, receivers: Sequence[Receiver], version: int) -> None:
        """Brings replicas of samplers to version 1 or more: from the trainer, all by one stream,
        else from the store. The caller holds them.

        Args:
            pair: That of one of them; all follow the same weights, or are of the one module that
                follows an average.

        Raises:
            TransientError: the trainer or a replica died, or was too slow. Replicas in the middle
                of a load are replaced before they work again.
            SyncError: the weights of the store do not load either.
        """
        left = receivers
        if receivers and self._can_send(pair, version):
            left = await deliver(
                self._pools[pair.source],
                receivers,
                version=version,
                bucket_bytes=self._settings.sync_bucket_bytes,
                average=pair.average,
                committed=(await self.followed(pair, version)).digest,
                timeout_s=self._settings.sync_timeout_s,
            )
            for pool, replica in left:
                pool.tell_incident(
                    "sync-fallback",
                    f"the weights of version {version} did not come from {pair.source!r} to replica"
                    f" {replica.index} of pool {pool.name!r}, and are read from the store",
                    replica=replica.index,
                    version=version,
                )
        async with together() as group:
            for pool, replica in left:
                group.create_task(self._restore(pool, replica, version))

    def _can_send(self, pair: SyncPair, version: int) -> bool:
        """Whether the trainer holds that version and is at rest."""
        if pair.source not in self._pools:
            return False
        (replica,) = self._pools[pair.source].replicas
        is_at_rest = replica.alive and not replica.working_on and not replica.unanswered
        return is_at_rest and replica.state.clean and replica.version == version

    async def _restore(self, pool: Pool, replica: Replica, version: int) -> None:
        """A sampler from the store."""
        if replica.version == NO_VERSION:
            await pool.rebuild(replica)  # a failed load leaves an engine in no known state
        replica.state = await pool.on_replica(
            replica,
            "restore",
            self._attempt,
            await self.followed(self.pair_of(pool.name), version),
            version,
            what=f"loading the weights of version {version}",
            timeout_s=self._settings.sync_timeout_s,
        )

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
