"""Evaluation: a policy version on held-out prompts, its shards and its summary in the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Any

from prefect import task

from rlhf_flows.data.arrow import from_parquet
from rlhf_flows.data.plan import EpisodePlan, make_plan
from rlhf_flows.pools import Source
from rlhf_flows.pools.shards import metrics_of
from rlhf_flows.store import commit_json, read_json
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, mean_metrics, run_shard, together
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import Runtime

__all__ = ["evaluation", "evaluation_digest"]


@task(name="evaluation", task_run_name="evaluation of version {version}", **PHASE)
async def evaluation(runtime: Runtime, version: int) -> dict[str, Any]:
    """Evaluates one policy version, or reads the evaluation that is there. Returns its metrics."""
    started = time.perf_counter()
    digest = evaluation_digest(runtime)
    done_key = runtime.layout.evaluation_done(version, digest)
    state = runtime.state.evaluations.get((version, digest))
    if state is not None and state.done:
        payload = await asyncio.to_thread(read_json, runtime.store, done_key)
        return _finished(runtime, version, 0.0, payload["metrics"])
    assert runtime.evaluator is not None
    graph = runtime.evaluator
    phase = PhaseGraph.of("evaluation", graph, frozenset(n.id for n in graph.nodes))
    for node in phase.nodes:
        runtime.pools[node.module].begin_phase()
    plan = _plan(runtime)
    there = dict(state.shards) if state is not None else {}
    runtime.progress.started("evaluation", version, len(plan.shards))
    done = len(there)

    async def make(index: int) -> dict[str, tuple[float, int]]:
        nonlocal done
        columns = plan.samples(index)
        # Ids name the version; seeds do not, so that versions are compared on equal draws.
        columns["sample_id"] = [
            f"v{version:06d}{i[len('e000000') :]}" for i in columns["sample_id"]
        ]
        job = ShardJob(
            index=index,
            episode=version,
            key=runtime.layout.evaluation_shard(version, digest, index),
            versions={pair.target: version for pair in runtime.syncs},
            source=Source(dataset="eval", columns=columns),
        )
        _, report = await run_shard(runtime, phase, job)
        done += 1
        runtime.progress.advanced("evaluation", version, done)
        return dict(report.metrics)

    async with together() as group:
        missing = [i for i in range(len(plan.shards)) if i not in there]
        made = [group.create_task(make(i)) for i in missing]
    stored = [await asyncio.to_thread(_read_metrics, runtime, key) for key in there.values()]
    metrics = mean_metrics([*stored, *(m.result() for m in made)])
    seconds = time.perf_counter() - started
    payload = {"version": version, "rows": plan.num_samples, "metrics": metrics, "seconds": seconds}
    commit = await asyncio.to_thread(commit_json, runtime.store, done_key, payload)
    return _finished(runtime, version, seconds, commit.payload["metrics"])


def _finished(
    runtime: Runtime, version: int, seconds: float, metrics: dict[str, float]
) -> dict[str, Any]:
    runtime.progress.finished("evaluation", version, seconds, metrics)
    return {"version": version, "seconds": seconds, "metrics": metrics}


def evaluation_digest(runtime: Runtime) -> str:
    """Names an evaluation by what it computes: its prompts, its calls, its seed."""
    graph, dataset = runtime.evaluator, runtime.eval_dataset
    assert graph is not None
    assert dataset is not None
    settings = runtime.config.runtime
    what = {
        "dataset": dataset.digest,
        "calls": [n.label for n in graph.nodes],
        "samples": settings.eval_num_inference_per_prompt,
        "seed": settings.seed,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _plan(runtime: Runtime) -> EpisodePlan:
    dataset = runtime.eval_dataset
    assert dataset is not None
    settings = runtime.config.runtime
    group = settings.eval_num_inference_per_prompt
    return make_plan(
        run_seed=settings.seed + 2**31,
        episode=0,
        num_rows=dataset.num_rows,
        dataset_digest=dataset.digest,
        sample_per_episode=dataset.num_rows * group,
        group_size=group,
        groups_per_shard=max(1, settings.samples_per_shard // group),
        shuffle=False,
        versions={},
    )


def _read_metrics(runtime: Runtime, key: str) -> dict[str, tuple[float, int]]:
    return metrics_of(from_parquet(runtime.store.get(key)))
