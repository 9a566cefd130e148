"""The flow that strings phases together: a chain per episode, and asynchrony as a missing edge.

Version `v` is what training of episode `v - 1` committed. The edges (design, section 5):

- rollout of episode e: the sync to the version that it samples from, and the rollout before it;
- scoring of e: consumes rollout of e shard by shard;
- training of e: training of e - 1 (with `max_staleness` above 0 its files are enough, and the
  upload and the commit go on beside), and scoring of e shard by shard;
- sync to v: training of v - 1, and everybody who still asks the samplers for an older version;
- evaluation of v: the sync to v;
- training of e: where a phase asks a trained module itself, all that this phase asks of version e.

With `max_staleness=0` these edges leave no choice: on-policy. With 1 the rollout of e + 1 has no
edge from training of e, so they overlap. There is no second scheduler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from rlhf_flows.errors import TransientError
from rlhf_flows.store import ShardPhase
from rlhf_flows.tasks import Runtime, evaluation, param_sync, rollout, scoring, training
from rlhf_flows.tasks.evaluation import evaluation_digest
from rlhf_flows.tasks.guarding import held_version
from rlhf_flows.tasks.retention import retain
from rlhf_flows.together import together

__all__ = ["RunResult", "is_finished", "phases_of", "run_episodes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What an attempt did, and what the whole run has come to."""

    run: str
    url: str
    """Where everything of the run lies."""
    version: int
    """The newest policy version."""
    resumed_at: int
    """The first episode that this attempt trained; 0 for a new run."""
    flow_run_id: str = ""
    episodes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What training measured, by episode."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Means over the held-out prompts, by policy version."""
    evaluated: dict[int, list[str]] = field(default_factory=dict)
    """Keys of the shards of each evaluation."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of this attempt, by phase."""
    left_out: tuple[int, ...] = ()
    """Versions that were to be evaluated, but whose weights retention had deleted."""


async def run_episodes(runtime: Runtime) -> RunResult:
    """Runs what is missing of the run, from what its store holds."""
    phases = _Phases(runtime)
    async with together() as group:
        await phases.schedule(group)
    return await phases.result()


def is_finished(runtime: Runtime) -> bool:
    """Whether nothing is missing of the run, so that no pool is needed."""
    phases = _Phases(runtime)
    return phases.first == phases.last and not phases.missing_evaluations(phases.last + 1)


def phases_of(runtime: Runtime) -> dict[str, list[int]]:
    """The episodes or policy versions of each phase, of the whole run, done or not."""
    if runtime.backfill is not None:
        return {"evaluation": list(runtime.backfill.versions)}
    phases = _Phases(runtime)
    episodes, versions = range(phases.last), range(phases.last + 1)
    numbers = {
        "rollout": [e for e in episodes if runtime.rollout_nodes],
        "scoring": [e for e in episodes if runtime.scoring_nodes],
        "training": list(episodes),
        "param_sync": [v for v in versions if v and runtime.syncs and phases.is_synced(v)],
        "evaluation": [v for v in versions if phases.is_evaluated(v)],
    }
    return {phase: found for phase, found in numbers.items() if found}


class _Phases:
    """The tasks of this attempt, by phase and number, and the edges between them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # Without a trainer there is version 0 alone: what an evaluator looks at.
        self.last = 0 if runtime.trainer is None else runtime.num_episode
        self.first = min(runtime.state.trained_episodes, self.last)
        self.seconds: dict[str, float] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.evaluated: dict[int, list[str]] = {}
        self._done: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup

    async def schedule(self, group: asyncio.TaskGroup) -> None:
        """Creates the tasks episode by episode; they wait for each other by their edges."""
        self._group = group
        runtime = self.runtime
        start = runtime.sampling_version(self.first) if self.first < self.last else self.last
        self._read_evaluations()
        if is_finished(runtime):
            self._start_last_retention()
            return
        for version in self.missing_evaluations(start):
            # Its weights are still there: the attempt that trained it died before it was evaluated.
            self._start("sync", version, self._sync(version))
            self._start_evaluation(version)
        if runtime.syncs:
            self._start("sync", start, self._sync(start))
        self._start_evaluation(start)
        for version in range(start + 1, self.first + 1):
            # Trained already, and not sampled from yet: the samplers lag behind.
            self._start_synced(version)
        ahead = runtime.config.runtime.max_staleness + 2
        for episode in range(self.first, self.last):
            await self._after(("training", episode - ahead))
            if runtime.rollout_nodes:
                self._start("rollout", episode, self._rollout(episode))
            if runtime.scoring_nodes:
                self._start("scoring", episode, self._scoring(episode))
            if runtime.trainer is not None:
                self._start("training", episode, self._training(episode))
            self._start_synced(episode + 1)
        self._start_last_retention()

    def _start_synced(self, version: int) -> None:
        if self.runtime.syncs and self.is_synced(version):
            self._start("sync", version, self._sync(version))
        self._start_evaluation(version)

    def _start(self, phase: str, number: int, work: Coroutine[Any, Any, None]) -> None:
        self._done[phase, number] = self._group.create_task(work, name=f"{phase} {number}")

    async def _after(self, *edges: tuple[str, int]) -> None:
        """Waits for those of the named tasks that exist; what they raise ends the group."""
        tasks = [self._done[edge] for edge in edges if edge in self._done]
        if tasks:
            await asyncio.wait(tasks)
            if any(t.cancelled() or t.exception() for t in tasks):
                raise asyncio.CancelledError  # the group raises the cause

    def _count(self, phase: str, report: dict[str, Any]) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + float(report["seconds"])

    # ---- the phases and their edges -------------------------------------------------------

    def _syncs_before(self, episode: int) -> list[tuple[str, int]]:
        return [("sync", v) for v in set(self.runtime.sampling_versions(episode).values())]

    async def _rollout(self, episode: int) -> None:
        await self._after(*self._syncs_before(episode), ("rollout", episode - 1))
        if self.runtime.trained_in("rollout"):
            await self._after(("training", episode - 1))
        data = await self.runtime.episode(episode)
        try:
            self._count("rollout", await rollout(self.runtime, episode))
        except BaseException as e:
            data.rollout.fail(e)
            raise

    async def _scoring(self, episode: int) -> None:
        await self._after(("scoring", episode - 1))
        if not self.runtime.rollout_nodes:
            await self._after(*self._syncs_before(episode))
        if self.runtime.trained_in("scoring"):
            await self._after(("training", episode - 1))
        data = await self.runtime.episode(episode)
        try:
            self._count("scoring", await scoring(self.runtime, episode))
        except BaseException as e:
            data.scored.fail(e)
            raise

    async def _training(self, episode: int) -> None:
        if self.runtime.config.runtime.max_staleness:
            await self.runtime.ahead.until_written(episode)
        else:
            await self._after(("training", episode - 1))
        for phase in ("rollout", "scoring"):
            # Whoever is asked for samples of a version must not leave it meanwhile.
            if self.runtime.trained_in(phase):
                await self._after((phase, episode))
        if self.runtime.trained_in("evaluation"):
            await self._after(*[("evaluation", v) for v in range(episode + 1)])
        if self.runtime.environment is not None:
            # Not an edge of the graph: a Prefect task run that only waits would count as running.
            data = await self.runtime.episode(episode)
            await _first_shard(data.scored)
        self._count("training", await training(self.runtime, episode))
        self.runtime.forget(episode)
        self._start("retention", episode + 1, self._retention(episode + 1))

    async def _retention(self, version: int) -> None:
        await self._after(("retention", version - 1))
        await self._retain(version)

    def _start_last_retention(self) -> None:
        if self.last:
            self._start("last retention", self.last, self._last_retention())

    async def _last_retention(self) -> None:
        """Lets go of what was to be evaluated yet when the last version was committed, and of what
        an attempt did not come to that was killed after its last commit."""
        await self._after(("training", self.last - 1))
        versions = range(self.last + 1)
        readers = [(phase, v) for phase in ("sync", "evaluation") for v in versions]
        await self._after(("retention", self.last), *readers)
        await self._retain(self.last)

    async def _retain(self, newest: int) -> None:
        due = {v for v in range(1, newest + 1) if self.is_evaluated(v)}
        needed = due - self._evaluated_versions() - self.evaluations.keys()
        # Where nothing samples from what follows, as beside a reward model's training, training
        # does not wait for it: a version may be several behind when it is its turn.
        needed |= {v for (phase, v), t in self._done.items() if phase == "sync" and not t.done()}
        evaluations = None
        if self.runtime.evaluator is not None:
            evaluations = self.evaluations
            # Done, and not read yet: they may be among the best.
            needed |= self._evaluated_versions() - self.evaluations.keys()
        try:
            if (held := await held_version(self.runtime, newest)) is not None:
                needed.add(held)
            await retain(self.runtime, newest=newest, needed=needed, evaluations=evaluations)
        except TransientError as e:
            logger.warning("old weights were not deleted, the next version tries again: %s", e)

    async def _sync(self, version: int) -> None:
        staleness = self.runtime.config.runtime.max_staleness
        episodes = [
            e
            for e in range(self.first, min(version + staleness, self.last))
            if self.runtime.sampling_version(e) < version
        ]
        # A module that follows a trainer may be asked in scoring, too, and there alone.
        phases: tuple[ShardPhase, ...] = ("rollout", "scoring")
        readers = [(p, e) for p in phases if self.runtime.followed_in(p) for e in episodes]
        evaluations = [("evaluation", v) for v in range(version)]
        await self._after(("training", version - 1))
        # Only now are all readers scheduled: the schedule runs a few episodes ahead of training.
        await self._after(*readers, *evaluations)
        self._count("param_sync", await param_sync(self.runtime, version))

    async def _evaluation(self, version: int) -> None:
        await self._after(("sync", version), ("training", version - 1))
        report = await evaluation(self.runtime, version)
        self.evaluations[version] = report["metrics"]
        self.evaluated[version] = report["shards"]
        self._count("evaluation", report)

    # ---- what is evaluated ----------------------------------------------------------------

    def is_synced(self, version: int) -> bool:
        """Whether any module that follows a trainer is brought to `version`."""
        if not self.runtime.syncs:
            every = self.runtime.config.runtime.sync_frequency
            return version % every == 0 or version == self.last
        return any(self.runtime.is_due(pair.target, version) for pair in self.runtime.syncs)

    def is_evaluated(self, version: int) -> bool:
        settings = self.runtime.config.runtime
        if self.runtime.evaluator is None or not self.is_synced(version):
            return False
        if self.runtime.only_evaluates:
            return version == self.last
        if version == 0 and self.last > 0:
            return settings.enable_eval_before_training
        interval = settings.eval_episode_interval
        return version == self.last or bool(interval and version % interval == 0)

    def _start_evaluation(self, version: int) -> None:
        if self.is_evaluated(version) and ("evaluation", version) not in self._done:
            self._start("evaluation", version, self._evaluation(version))

    def _evaluated_versions(self) -> set[int]:
        if self.runtime.evaluator is None:
            return set()
        digest = evaluation_digest(self.runtime)
        found = self.runtime.state.evaluations.items()
        return {version for (version, of), state in found if of == digest and state.done}

    def _read_evaluations(self) -> None:
        """Evaluations that are done are read, for the result."""
        for version in sorted(self._evaluated_versions()):
            self._start("evaluation", version, self._evaluation(version))

    def missing_evaluations(self, below: int) -> list[int]:
        """Versions below `below` that should be evaluated, are not, and have their weights."""
        done = self._evaluated_versions()
        lost = self.runtime.weights.versions_without_weights()
        return [
            v
            for v in range(min(below, self.first + 1))
            if self.is_evaluated(v) and v not in done and v not in lost
        ]

    async def result(self) -> RunResult:
        runtime = self.runtime
        episodes = {}
        for version in range(1, self.last + 1):
            commit = await runtime.weights.commit_of(version)
            episodes[version - 1] = {**commit["metrics"], "seconds": commit["seconds"]}
        return RunResult(
            run=runtime.run,
            url=f"{runtime.store.url}/{runtime.run}",
            version=self.last,
            resumed_at=self.first,
            episodes=episodes,
            evaluations=dict(sorted(self.evaluations.items())),
            evaluated=dict(sorted(self.evaluated.items())),
            seconds=self.seconds,
        )


async def _first_shard(stream: Any) -> None:
    async for _ in stream:
        return
