"""The loop of a backfill: version by version, what was not evaluated yet.

In order, because a sampler holds one version at a time, and the first is what it was made from.
Before each version the run is listed anew: it may live, and evaluate or delete meanwhile.
"""

from __future__ import annotations

import logging
from typing import Any

from rlhf_flows.errors import ConfigError, FencedError, RlhfFlowsError
from rlhf_flows.flow import RunResult
from rlhf_flows.store import RunLayout, RunState
from rlhf_flows.tasks import Runtime, evaluation, param_sync
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.evaluation import evaluation_digest

__all__ = ["is_backfilled", "run_backfill", "versions_deleted"]

logger = logging.getLogger(__name__)


def is_backfilled(runtime: Runtime) -> bool:
    """Whether nothing is left that can be evaluated, so that no pool is needed."""
    versions = _of(runtime).versions
    return all(_is_done(runtime, v) or _is_deleted(runtime, v) for v in versions)


def versions_deleted(run: str, state: RunState) -> set[int]:
    """Versions of a run whose weights retention has deleted, or began to."""
    layout = RunLayout(run)
    versions = (layout.version_of_weights(prefix) for prefix in state.deleted)
    return {version for version in versions if version is not None}


async def run_backfill(runtime: Runtime) -> RunResult:
    """Evaluates what is missing of the versions asked for; reads the others.

    A version whose weights are deleted meanwhile is left out, and named among the warnings.

    Raises:
        ConfigError: nothing is left to evaluate.
    """
    backfill = _of(runtime)
    metrics: dict[int, dict[str, float]] = {}
    shards: dict[int, list[str]] = {}
    seconds: dict[str, float] = {}
    for version in backfill.versions:
        await runtime.look_again()
        if not _is_done(runtime, version) and _is_deleted(runtime, version):
            continue
        try:
            report = await _evaluated(runtime, version, seconds)
        except FencedError:
            raise
        except RlhfFlowsError:
            await runtime.look_again()
            if not _is_deleted(runtime, version):
                raise
            continue
        metrics[version], shards[version] = report["metrics"], report["shards"]
    if not metrics:
        raise ConfigError(
            f"the weights of every version of run {backfill.run!r} that was to be evaluated are"
            " deleted by now: raise runtime.keep_last of that run, or set runtime.keep_every"
        )
    gone = {*backfill.left_out, *(v for v in backfill.versions if v not in metrics)}
    if gone:
        logger.warning(
            "of run %s, these versions were not evaluated, as their weights were deleted by"
            " retention: %s",
            backfill.run,
            ", ".join(map(str, sorted(gone))),
        )
    return RunResult(
        run=backfill.run,
        url=f"{runtime.store.url}/{backfill.run}",
        version=max(metrics),
        resumed_at=0,
        evaluations=metrics,
        evaluated=shards,
        seconds=seconds,
        left_out=tuple(sorted(gone)),
    )


async def _evaluated(runtime: Runtime, version: int, seconds: dict[str, float]) -> dict[str, Any]:
    phases = () if _is_done(runtime, version) else (("param_sync", param_sync),)
    for name, phase in (*phases, ("evaluation", evaluation)):
        report: dict[str, Any] = await phase(runtime, version)
        seconds[name] = seconds.get(name, 0.0) + float(report["seconds"])
    return report


def _of(runtime: Runtime) -> Backfill:
    assert runtime.backfill is not None
    return runtime.backfill


def _is_done(runtime: Runtime, version: int) -> bool:
    state = runtime.state.evaluations.get((version, evaluation_digest(runtime)))
    return state is not None and state.done


def _is_deleted(runtime: Runtime, version: int) -> bool:
    return version in versions_deleted(_of(runtime).run, runtime.state)
