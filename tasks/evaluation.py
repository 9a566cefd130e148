"""Evaluation: a policy version on held-out prompts, its shards and its summary in the store.

A sample that ends or hangs its worker again and again is left out, alone: nothing is computed from
groups. `done.json` names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prefect import task

from rlhf_flows.data.arrow import from_parquet
from rlhf_flows.data.plan import EpisodePlan, make_plan
from rlhf_flows.data.quarantine import Blamed
from rlhf_flows.errors import DataDamageError, ShardDamageError, UserError
from rlhf_flows.graph import BATCH, Graph
from rlhf_flows.pools import Source
from rlhf_flows.pools.shards import metrics_of, previews_of
from rlhf_flows.store import EvaluationState, ObjectStore, commit_json, read_json
from rlhf_flows.tasks.bisection import Failure
from rlhf_flows.tasks.catching_up import ensure_trained
from rlhf_flows.tasks.dispatch import PhaseGraph, ShardJob, mean_metrics, run_shard
from rlhf_flows.tasks.quarantine import refuse_more, tell_blamed
from rlhf_flows.tasks.retrying import PHASE
from rlhf_flows.tasks.runtime import Runtime
from rlhf_flows.together import together

__all__ = ["evaluated_batches", "evaluation", "evaluation_digest"]

logger = logging.getLogger(__name__)

_SHARDS_SHOWN = 2
"""Of an evaluation, whose samples are shown: the first, whose prompts are the same each time."""


@task(name="evaluation", task_run_name="evaluation of version {version}", **PHASE)
async def evaluation(runtime: Runtime, version: int) -> dict[str, Any]:
    """Evaluates one policy version, or reads the evaluation that is there. Returns its metrics."""
    started = time.perf_counter()
    digest = evaluation_digest(runtime)
    done_key = runtime.layout.evaluation_done(version, digest)
    await runtime.begin("evaluation", version)
    state = runtime.state.evaluations.get((version, digest))
    if state is not None and state.done:
        payload = await asyncio.to_thread(read_json, runtime.store, done_key)
        keys = [state.shards[i] for i in sorted(state.shards)]
        runtime.progress.held_out(version, payload.get("previews", ()))
        return _finished(runtime, version, 0.0, payload["metrics"], keys)
    await ensure_trained(runtime, "evaluation", version)
    found = _Evaluation(runtime, version, digest)
    metrics = await found.run(state or EvaluationState(shards={}, done=False))
    keys = [found.keys[i] for i in sorted(found.keys)]
    if runtime.post_process is not None:
        metrics |= await asyncio.to_thread(_post_process, runtime, version, keys)
    seconds = time.perf_counter() - started
    payload = {
        "version": version,
        "rows": found.plan.num_samples - len(found.blamed),
        "quarantined": [found.blamed[name].to_json() for name in sorted(found.blamed)],
        "metrics": metrics,
        "previews": found.previews(),
        "seconds": seconds,
    }
    runtime.progress.held_out(version, payload["previews"])
    commit = await asyncio.to_thread(commit_json, runtime.store, done_key, payload)
    return _finished(runtime, version, seconds, commit.payload["metrics"], keys)


def evaluated_batches(graph: Graph, store: ObjectStore, keys: Sequence[str]) -> dict[str, Any]:
    """`{module: [batches]}`: what an evaluation holds, for each module whose output it returns."""
    batches = [from_parquet(store.get(key)) for key in keys]
    outputs = [i for i in graph.outputs if i != BATCH] or [graph.nodes[-1].id]
    return dict.fromkeys(dict.fromkeys(graph.nodes[i].module for i in outputs), batches)


def _post_process(runtime: Runtime, version: int, keys: Sequence[str]) -> dict[str, float]:
    assert runtime.evaluator is not None
    assert runtime.post_process is not None
    results = evaluated_batches(runtime.evaluator, runtime.store, keys)
    about = {
        "run": runtime.layout.run,
        "policy_version": version,
        "episode_iteration": version,
        "train_iteration": version,
    }
    try:
        found = runtime.post_process(results, about)
    except Exception as e:
        raise UserError(
            f"post_process of the evaluator failed on version {version} ({type(e).__name__}: {e})"
        ) from e
    if not isinstance(found, Mapping):
        return {}
    return {str(k): float(v) for k, v in found.items() if isinstance(v, int | float)}


class _Evaluation:
    """The shards of one evaluation: those that are there are read, the others are made."""

    def __init__(self, runtime: Runtime, version: int, digest: str) -> None:
        assert runtime.evaluator is not None
        graph = runtime.evaluator
        self.plan = _plan(runtime)
        self.blamed: dict[str, Blamed] = {}
        """By sample id."""
        self.keys: dict[int, str] = {}
        """Of the shards that are there, by index."""
        self._previews: dict[int, Sequence[Mapping[str, Any]]] = {}
        self._runtime = runtime
        self._version, self._digest = version, digest
        self._phase = PhaseGraph.of("evaluation", graph, frozenset(n.id for n in graph.nodes))
        self._done = 0

    async def run(self, state: EvaluationState) -> dict[str, float]:
        """The means over all samples that were not left out."""
        runtime = self._runtime
        runtime.progress.started("evaluation", self._version, len(self.plan.shards))
        generations = {i: state.next_generation(i) for i in range(len(self.plan.shards))}
        found = []
        for index, key in state.shards.items():
            try:
                found.append(await asyncio.to_thread(self._read, index, key))
            except ShardDamageError as damage:
                generations[index] = (await runtime.bury(damage)).generation + 1
            else:
                del generations[index]
                self.keys[index] = key
        self._done = len(found)
        async with together() as group:
            made = [group.create_task(self._make(i, g)) for i, g in generations.items()]
        return mean_metrics([*found, *(m.result() for m in made)])

    def previews(self) -> list[dict[str, Any]]:
        """Some samples, of the first shards that have any."""
        shards = [self._previews[i] for i in sorted(self._previews)[:_SHARDS_SHOWN]]
        return [_as_json(preview) for some in shards for preview in some]

    def _read(self, index: int, key: str) -> dict[str, tuple[float, int]]:
        """The metrics of a shard that is there, and who was left out of it."""
        store = self._runtime.store
        try:
            batch = from_parquet(store.get(key))
        except DataDamageError as e:
            raise ShardDamageError(f"the shard {store.url}/{key} is damaged: {e}", key=key) from e
        self._previews[index] = previews_of(batch)
        there = set(batch["sample_id"])
        for name in self._columns(index)["sample_id"]:
            if name not in there:
                blamed = Blamed(
                    sample_id=name,
                    phase="evaluation",
                    module=self._phase.nodes[-1].module,
                    cause="left out by an earlier try, whose log says why",
                )
                self.blamed.setdefault(name, blamed)
        return metrics_of(batch)

    async def _make(self, index: int, generation: int) -> dict[str, tuple[float, int]]:
        """Makes a shard, or adopts the one that somebody was faster with, and who it lacks."""
        runtime, version = self._runtime, self._version
        columns = self._columns(index)
        while True:
            job = ShardJob(
                index=index,
                episode=version,
                key=runtime.layout.evaluation_shard(version, self._digest, index, generation),
                versions=runtime.evaluated_versions(version),
                groups=tuple((name,) for name in columns["sample_id"]),
                source=Source(dataset="eval", columns=columns),
            )
            try:
                _, report = await run_shard(runtime, self._phase, job, blame=self._blame)
                metrics = dict(report.metrics)
                self._previews[index] = report.previews
                if report.adopted:
                    metrics = await asyncio.to_thread(self._read, index, report.key)
            except ShardDamageError as damage:
                generation = (await runtime.bury(damage)).generation + 1
            else:
                self._done += 1
                if report.key:
                    self.keys[index] = report.key
                runtime.progress.advanced("evaluation", version, self._done)
                return metrics

    async def _blame(self, culprits: Mapping[str, Failure]) -> Collection[str]:
        for name, f in culprits.items():
            self.blamed[name] = Blamed(
                sample_id=name, phase="evaluation", module=f.module, cause=f.cause
            )
        where = f"evaluation of version {self._version} of run {self._runtime.layout.run!r}"
        refuse_more(self._runtime, where, list(self.blamed.values()))
        for name in culprits:
            logger.warning("%s goes on without %s", where, name)
            tell_blamed(self._runtime, self.blamed[name], version=self._version)
        return culprits.keys()

    def _columns(self, index: int) -> dict[str, list[Any]]:
        """Ids name the version; seeds do not, so that versions are compared on equal draws."""
        columns = self.plan.samples(index)
        names = [f"v{self._version:06d}{i[len('e000000') :]}" for i in columns["sample_id"]]
        return {**columns, "sample_id": names}


def _as_json(preview: Mapping[str, Any]) -> dict[str, Any]:
    """What of it a record can hold: a reward that is no number is for the shard to tell."""
    return {
        name: value
        for name, value in preview.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


def _finished(
    runtime: Runtime, version: int, seconds: float, metrics: dict[str, float], keys: Sequence[str]
) -> dict[str, Any]:
    runtime.progress.finished("evaluation", version, seconds, metrics)
    return {"version": version, "seconds": seconds, "metrics": metrics, "shards": list(keys)}


def evaluation_digest(runtime: Runtime) -> str:
    """Names an evaluation by what it computes: its prompts, its calls, its seed. How a run samples
    and rewards is fixed by its configuration, and part of the name where a backfill does otherwise.
    """
    graph, dataset = runtime.evaluator, runtime.eval_dataset
    assert graph is not None
    assert dataset is not None
    settings = runtime.config.runtime
    what: dict[str, Any] = {
        "dataset": dataset.digest,
        "calls": [n.call for n in graph.nodes],
        "samples": settings.eval_num_inference_per_prompt,
        "seed": settings.seed,
    }
    if runtime.backfill is not None and runtime.backfill.settings is not None:
        what["settings"] = runtime.backfill.settings
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
