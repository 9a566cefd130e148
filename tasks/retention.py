"""Which weights and training states are kept: the newest few, milestones and the best where they
are asked for, and what somebody still needs.

A plan to come may name a version, and an evaluation that is due needs its own, whoever dies
meanwhile: a sampler that comes back, or the next attempt, takes the weights from here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Mapping, Sequence

from rlhf_flows.pools import CheckpointRecord
from rlhf_flows.store import FolderRecord, delete_folder
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["Retention", "best_versions", "milestones", "retain"]

logger = logging.getLogger(__name__)

Evaluations = Mapping[int, Mapping[str, float]]


async def retain(
    runtime: Runtime,
    *,
    newest: int,
    needed: Collection[int] = (),
    evaluations: Evaluations | None = None,
) -> None:
    """Deletes what is older than `runtime.keep_last` versions, neither a milestone
    (`runtime.keep_every`) nor among the best (`runtime.keep_best`), and named by no plan to come.

    Training state is kept for the last `keep_last` full checkpoints, so that a run with
    `save_episode_interval` above 1 always has one to go back to.

    Args:
        newest: The newest policy version.
        needed: Versions whose weights are kept in any case: those still to be evaluated.
        evaluations: Metrics of the versions that were evaluated, by version; None where the run
            has no evaluator.
    """
    # The oldest version that an unfinished episode samples from.
    settings = runtime.config.runtime
    named = runtime.sampling_version(newest)
    left = set(range(1, newest + 1)) - runtime.weights.versions_without_weights()
    kept = milestones(settings.keep_every, newest) | await _best(runtime, left, evaluations)
    policy = Retention(
        keep_last=settings.keep_last, newest=newest, named=named, needed=needed, kept=kept
    )
    doomed: list[FolderRecord] = []
    for version in range(newest, 0, -1):
        payload = await runtime.weights.commit_of(version)
        records = [CheckpointRecord.from_json(entry) for entry in payload["checkpoints"].values()]
        old = policy.old(
            version,
            states=[r.state for r in records if r.state is not None],
            weights=[folder for r in records for folder in r.weights_folders],
        )
        are_gone = bool(old) and runtime.weights.gone.issuperset(folder.prefix for folder in old)
        if are_gone and min(left, default=newest) > version:
            break  # an earlier call was here already, and has left nothing below
        doomed += old
    # The oldest first: whoever is killed here leaves no gap that would hide what is below it.
    for folder in reversed(doomed):
        if folder.prefix not in runtime.weights.gone:
            reason = f"retention after version {newest}"
            await asyncio.to_thread(delete_folder, runtime.store, runtime.layout, folder, reason)
            runtime.weights.gone.add(folder.prefix)


class Retention:
    """Which folders of a run are old. Pure; asked version by version, the newest first."""

    def __init__(
        self,
        *,
        keep_last: int,
        newest: int,
        named: int,
        needed: Collection[int] = (),
        kept: Collection[int] = (),
    ) -> None:
        """
        Args:
            named: The oldest version that a plan to come may name.
            needed: Versions whose weights are kept in any case.
            kept: Versions that are kept with their training state.
        """
        self._keep_last, self._newest, self._named = keep_last, newest, named
        self._needed, self._kept = needed, kept
        self._full = 0

    def old(
        self, version: int, *, states: Sequence[FolderRecord], weights: Sequence[FolderRecord]
    ) -> list[FolderRecord]:
        """Those of the folders of a version that are not kept."""
        if version in self._kept:
            is_settled = is_old = False
        else:
            is_settled = self._full >= self._keep_last
            is_old = (
                version <= self._newest - self._keep_last
                and version < self._named
                and version not in self._needed
            )
        self._full += bool(states)
        old = list(states) if is_settled else []
        return [*old, *weights] if is_settled and is_old else old


def milestones(keep_every: int | None, newest: int) -> set[int]:
    """The versions that `runtime.keep_every` keeps for good."""
    return set(range(keep_every, newest + 1, keep_every)) if keep_every else set()


async def _best(
    runtime: Runtime, left: Collection[int], evaluations: Evaluations | None
) -> set[int]:
    """Of the versions that are left; what fell behind once never was among the best again, as long
    as the settings stay. Of equal ones the newer is better.
    """
    settings = runtime.config.runtime
    if not settings.keep_best:
        return set()
    measured: dict[int, Mapping[str, float]] = {}
    for version in sorted(left):
        if evaluations is None:
            metrics = (await runtime.weights.commit_of(version))["metrics"]
        else:
            metrics = evaluations.get(version, {})
        measured[version] = metrics
    best = best_versions(
        measured,
        settings.keep_best,
        metric=settings.keep_best_metric,
        highest=settings.keep_best_is == "highest",
    )
    known = {name for metrics in measured.values() for name in metrics}
    if known and not best:
        logger.warning(
            "runtime.keep_best_metric is %r, which no version has, so none is kept for it: known"
            " are %s",
            settings.keep_best_metric,
            ", ".join(sorted(known)),
        )
    return best


def best_versions(
    measured: Mapping[int, Mapping[str, float]], count: int, *, metric: str, highest: bool
) -> set[int]:
    """The `count` versions with the best metric, of those that have it."""
    sign = 1 if highest else -1
    found = {version: metrics.get(metric, math.nan) for version, metrics in measured.items()}
    values = {version: sign * value for version, value in found.items() if not math.isnan(value)}
    ranked = sorted(values, key=lambda version: (values[version], version), reverse=True)
    return set(ranked[:count])
