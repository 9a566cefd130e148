"""`Runtime`: what the phases of one attempt share: store, pools, graphs, plans, streams.

It lives in the flow process and holds no samples: handles, references and small records only. It
answers for the phases what is planned and what is there already; where the weights of a policy
version are, `weights` knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_flows.config import EngineConfig
from rlhf_flows.data.plan import EpisodePlan, make_plan
from rlhf_flows.data.quarantine import Blamed, Quarantine
from rlhf_flows.data.stream import ShardHandle, StreamDataset
from rlhf_flows.errors import (
    DataError,
    ShardDamageError,
    StoreDamageError,
)
from rlhf_flows.graph import Graph
from rlhf_flows.pools import Pool
from rlhf_flows.store import (
    KeyParts,
    ObjectStore,
    RunLayout,
    RunState,
    ShardPhase,
    check_fence,
    commit_json,
    parse_key,
    read_json,
    scan,
)
from rlhf_flows.tasks.ahead import Ahead
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.progress import NoProgress, Progress
from rlhf_flows.tasks.weights import RunWeights, SyncPair

__all__ = ["DatasetInfo", "EpisodeData", "PostProcess", "Runtime"]


logger = logging.getLogger(__name__)

_MOST_GENERATIONS = 5
"""Of one shard: a store that damages the next one, too, is not written to again and again."""


PostProcess = Callable[[dict[str, list[Any]], dict[str, Any]], Any]
"""Given `{module: [batches]}` of an evaluation and information on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    num_rows: int
    """Items of the dataset that the modules built."""
    digest: str
    """Of the rows that they were given."""
    parts: tuple[int, ...] = ()
    """Items of each of several datasets, which stand one after another."""
    lengths: tuple[int, ...] = ()
    """Of each row's prompt, where shards are to hold prompts of one length."""


@dataclass(slots=True, kw_only=True)
class EpisodeData:
    """One episode's plan and its shards as they come."""

    plan: EpisodePlan
    plan_generation: int
    """Which plan of this episode it is: a later one was made of other prompts."""
    rollout: StreamDataset
    scored: StreamDataset
    """What trainers read: the same stream as `rollout` where nothing is scored."""
    quarantine: Quarantine
    blaming: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who adds to `quarantine`."""

    def stream(self, phase: ShardPhase) -> StreamDataset:
        return self.rollout if phase == "rollout" else self.scored


class Runtime:
    """Not a dataclass on purpose: Prefect walks through dataclass parameters, and this is large."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        run: str,
        attempt: int,
        store: ObjectStore,
        state: RunState,
        pools: Mapping[str, Pool],
        environment: Graph | None,
        rollout_nodes: frozenset[int],
        scoring_nodes: frozenset[int],
        trainer: Graph | None,
        evaluator: Graph | None,
        syncs: Sequence[SyncPair],
        dataset: DatasetInfo | None,
        eval_dataset: DatasetInfo | None,
        progress: Progress | None = None,
        post_process: PostProcess | None = None,
        only_evaluates: bool = False,
        backfill: Backfill | None = None,
    ) -> None:
        """
        Args:
            post_process: Looks at what an evaluation found; its numbers join the metrics.
            only_evaluates: Nothing is trained but what is.
            backfill: What lies in the store is another run's, which is evaluated; `state` is of
                that one. `run` and `attempt` stay those of who evaluates it.
        """
        self.config = config
        self.run = run
        self.attempt = attempt
        self.store = store
        self.state = state
        self.layout = RunLayout(run if backfill is None else backfill.run)
        self.pools = pools
        self.environment = environment
        self.rollout_nodes = rollout_nodes
        self.scoring_nodes = scoring_nodes
        self.trainer = trainer
        self.evaluator = evaluator
        self.syncs = tuple(syncs)
        self.dataset = dataset
        self.eval_dataset = eval_dataset
        self.progress: Progress = progress or NoProgress()
        self.post_process = post_process
        self.only_evaluates = only_evaluates
        self.backfill = backfill
        self.num_episode = state.trained_episodes if only_evaluates else config.runtime.num_episode
        self.weights = RunWeights(
            config=config,
            run=self.layout.run,
            attempt=attempt,
            store=store,
            pools=pools,
            trained=frozenset() if trainer is None else frozenset(trainer.modules),
            syncs=self.syncs,
            deleted=state.deleted,
        )
        self.ahead = Ahead(state.trained_episodes)
        self._buried: dict[tuple[ShardPhase, int, int], int] = {}
        """(phase, episode, shard index) -> newest generation that this attempt found damaged."""
        self._episodes: dict[int, EpisodeData] = {}
        self._begun: set[tuple[str, int]] = set()
        self._planning = asyncio.Lock()
        for pool in pools.values():
            pool.bring_to = self.weights.bring_to
            pool.on_incident = self.incident

    def incident(self, kind: str, what: str, **facts: Any) -> None:
        """Tells whoever wants to know that something went wrong (`Progress`)."""
        self.progress.incident(kind, what, facts)

    # ---- plans and streams ----------------------------------------------------------------

    def sampling_versions(self, episode: int) -> dict[str, int]:
        """The version of each module that follows a trainer, in episode `episode` (design, 5)."""
        newest = max(0, episode - self.config.runtime.max_staleness)
        versions = {}
        for pair in self.syncs:
            every = self._sync_frequency(pair.target)
            versions[pair.target] = newest - newest % every if every else 0
        return versions

    def sampling_version(self, episode: int) -> int:
        """The oldest version that episode `episode` is sampled from, where modules are synced."""
        newest = max(0, episode - self.config.runtime.max_staleness)
        synced = [v for t, v in self.sampling_versions(episode).items() if self._sync_frequency(t)]
        return min(synced, default=newest)

    def is_due(self, target: str, version: int) -> bool:
        """Whether a module is brought to `version` by its param sync; to the last one, too."""
        every = self._sync_frequency(target)
        return bool(every) and (version % every == 0 or version == self.num_episode)

    def evaluated_versions(self, version: int) -> dict[str, int]:
        """What each module holds when policy version `version` is evaluated."""
        follow = {p.target: version if self._sync_frequency(p.target) else 0 for p in self.syncs}
        return {**follow, **dict.fromkeys(self.trained_in("evaluation"), version)}

    def _sync_frequency(self, target: str) -> int:
        said = self.config.for_model(target).sync_frequency
        return self.config.runtime.sync_frequency if said is None else said

    async def episode(self, number: int) -> EpisodeData:
        """The plan of an episode (made and committed if there is none) and its streams."""
        async with self._planning:
            if number not in self._episodes:
                plan = await asyncio.to_thread(self._committed_plan, number)
                blamed = await asyncio.to_thread(self._blamed, number)
                self._episodes[number] = self._streams(plan, Quarantine(plan, blamed))
            return self._episodes[number]

    async def prepare(self, number: int) -> None:
        """Makes the plan of an episode ahead of its time, if there is such an episode."""
        if number < self.num_episode:
            await self.episode(number)

    async def begin(self, phase: ShardPhase | Literal["evaluation"], number: int) -> None:
        """Before a phase asks what is missing of an episode or an evaluation.

        Where it began before, its task is retried, and the run is listed anew: calls whose answers
        nobody heard may have committed shards since, and records of quarantine with them.
        """
        if (phase, number) in self._begun:
            await self.look_again()
            if phase != "evaluation" and number in self._episodes:
                data = self._episodes[number]
                for record in await asyncio.to_thread(self._blamed, number):
                    data.quarantine.add(record)
                self._take_in(data, phase)
        self._begun.add((phase, number))

    async def look_again(self) -> None:
        """Lists the run anew: what this attempt made and let go of is there, too."""
        self.state = await asyncio.to_thread(scan, self.store, self.layout.run)

    def forget(self, number: int) -> None:
        """Lets go of an episode's references; the store keeps the shards."""
        self._episodes.pop(number, None)

    def _committed_plan(self, number: int) -> EpisodePlan:
        dataset = self.dataset
        assert dataset is not None
        plan = self._stored_plan(number)
        if plan is None:
            before = self._stored_plan(number - 1)
            if before is not None:
                self._refuse_drift(before, dataset)
            return self._commit_plan(number, dataset, generation=0)
        if self.state.episode(number).trained:
            return plan  # whatever its prompts were: its samples are there
        self._refuse_drift(plan, dataset)
        if plan.dataset_digest == dataset.digest:
            return plan
        return self._plan_anew(number, dataset)

    def _stored_plan(self, number: int) -> EpisodePlan | None:
        generation = self.state.episode(number).plans.get(0)
        if generation is None:
            return None
        key = self.layout.plan(number, generation=generation)
        return EpisodePlan.from_json(read_json(self.store, key))

    def _commit_plan(self, number: int, dataset: DatasetInfo, *, generation: int) -> EpisodePlan:
        check_fence(self.store, self.run, self.attempt)
        key = self.layout.plan(number, generation=generation)
        plan = self._make_plan(number, dataset).to_json()
        return EpisodePlan.from_json(commit_json(self.store, key, plan).payload)

    def _plan_anew(self, number: int, dataset: DatasetInfo) -> EpisodePlan:
        """Plans an episode on other prompts.

        What was made of the old ones is buried first: no plan may ever find the shards of another.
        """
        check_fence(self.store, self.run, self.attempt)
        found = self.state.episode(number)
        for phase, keys in (("rollout", found.rollout), ("scoring", found.scoring)):
            for index, key in keys.items():
                parts = parse_key(self.run, key)
                assert parts is not None
                assert parts.phase is not None
                tombstone = self.layout.tombstone(parts.phase, number, index, parts.generation)
                cause = "the prompts that it was made of were replaced"
                payload = {"damaged": key, "cause": cause, "attempt": self.attempt}
                commit_json(self.store, tombstone, payload)
            if keys:
                logger.warning(
                    "episode %d: %d shards of %s of the prompts before are left out",
                    number,
                    len(keys),
                    phase,
                )
        plan = self._commit_plan(number, dataset, generation=found.plans[0] + 1)
        self.state = scan(self.store, self.run)
        return plan

    def _refuse_drift(self, plan: EpisodePlan, dataset: DatasetInfo) -> None:
        if plan.dataset_digest == dataset.digest or self.config.runtime.new_prompts == "take":
            return
        raise DataError(
            f"run {self.run!r} was planned on a dataset with digest"
            f" {plan.dataset_digest[:12]} (episode {plan.episode}), the one given now has"
            f" {dataset.digest[:12]}: resume with the same prompts, start another run, or take"
            " these from the first episode on that is not trained, with runtime.new_prompts=take"
        )

    def has_prompts_of(self, data: EpisodeData) -> bool:
        """Whether the prompts of an episode are those of this attempt."""
        return self.dataset is not None and data.plan.dataset_digest == self.dataset.digest

    def _make_plan(self, number: int, dataset: DatasetInfo) -> EpisodePlan:
        runtime = self.config.runtime
        group = runtime.num_inference_per_prompt
        return make_plan(
            run_seed=runtime.seed,
            episode=number,
            num_rows=dataset.num_rows,
            dataset_digest=dataset.digest,
            sample_per_episode=runtime.sample_per_episode,
            group_size=group,
            groups_per_shard=max(1, runtime.samples_per_shard // group),
            shuffle=runtime.data_shuffle,
            versions=self.sampling_versions(number),
            parts=dataset.parts,
            ratio=runtime.data_ratio or (),
            lengths=dataset.lengths,
        )

    def _blamed(self, number: int) -> list[Blamed]:
        """The samples of an episode that are quarantined; of a trained one, those of its commit.

        The listing says which; the records are read because they say in which phase. A record that
        came after the commit (of an attempt that did not know of its end) changes nothing.
        """
        found = self.state.episode(number)
        names = set(found.quarantined)
        if found.trained and names:
            commit = read_json(self.store, self.layout.trained(number))
            names &= set(commit.get("quarantined", ()))
        return [
            Blamed.from_json(
                read_json(self.store, self.layout.quarantine(number, name, found.plans.get(0, 0)))
            )
            for name in sorted(names)
        ]

    def _streams(self, plan: EpisodePlan, quarantine: Quarantine) -> EpisodeData:
        size = len(plan.shards)
        rollout = StreamDataset(size, name=f"rollout of episode {plan.episode}")
        scored = rollout
        if self.scoring_nodes:
            scored = StreamDataset(size, name=f"scoring of episode {plan.episode}")
        data = EpisodeData(
            plan=plan,
            plan_generation=self.state.episode(plan.episode).plans.get(0, 0),
            rollout=rollout,
            scored=scored,
            quarantine=quarantine,
        )
        self._take_in(data, "rollout")
        self._take_in(data, "scoring")
        return data

    def _take_in(self, data: EpisodeData, phase: ShardPhase) -> None:
        """Appends the shards that were listed, and those of which nothing is left."""
        found = self.state.episode(data.plan.episode)
        keys = found.rollout if phase == "rollout" else found.scoring
        stream = data.stream(phase)
        for index in stream.missing:
            if index in keys:
                stream.append(ShardHandle(index=index, key=keys[index]))
            elif not data.quarantine.kept(phase, index):
                # All of its groups are left out: no object will ever come.
                stream.append(ShardHandle(index=index, key="", rows=0))

    # ---- damage ---------------------------------------------------------------------------

    def next_generation(self, phase: ShardPhase, episode: int, index: int) -> int:
        """The generation under which a missing or damaged shard is to be written."""
        listed = self.state.episode(episode).next_generation(phase, index)
        return max(listed, self._buried.get((phase, episode, index), -1) + 1)

    async def bury(self, damage: ShardDamageError) -> KeyParts:
        """Says for good that this generation of a shard is damaged: the next one counts.

        Raises StoreDamageError where that has happened too often to one shard.
        """
        parts = parse_key(self.layout.run, damage.key)
        assert parts is not None
        if parts.generation + 1 >= _MOST_GENERATIONS:
            raise StoreDamageError(
                f"{damage}. Generation after generation of this shard was damaged: look at the"
                f" disk or the server behind {self.store.url}, then resume"
            ) from damage
        if parts.kind == "evaluation_shard":
            key = self.layout.evaluation_tombstone(
                parts.version, parts.word, parts.index, parts.generation
            )
        else:
            assert parts.phase is not None
            key = self.layout.tombstone(parts.phase, parts.episode, parts.index, parts.generation)
            which = parts.phase, parts.episode, parts.index
            self._buried[which] = max(parts.generation, self._buried.get(which, 0))
        await self.check_fence()
        payload = {"damaged": damage.key, "cause": str(damage), "attempt": self.attempt}
        await asyncio.to_thread(commit_json, self.store, key, payload)
        logger.warning("%s: it is made again as generation %d", damage, parts.generation + 1)
        what = f"{damage}: it is made again"
        self.incident("shard-repair", what, shard=damage.key, generation=parts.generation + 1)
        return parts

    # ---- who asks whom ----------------------------------------------------------------------

    def trained_in(self, phase: ShardPhase | Literal["evaluation"]) -> frozenset[str]:
        """The trained modules that a phase asks themselves, not one that follows them."""
        if self.trainer is None:
            return frozenset()
        if phase == "evaluation":
            asked = set() if self.evaluator is None else set(self.evaluator.modules)
        else:
            nodes = self.rollout_nodes if phase == "rollout" else self.scoring_nodes
            graph = self.environment
            asked = {n.module for n in graph.nodes if n.id in nodes} if graph is not None else set()
        return frozenset(asked & self.trainer.modules.keys())

    def followed_in(self, phase: ShardPhase) -> list[str]:
        """The modules that take part in a phase of the environment with a trainer's weights."""
        nodes = self.rollout_nodes if phase == "rollout" else self.scoring_nodes
        graph = self.environment
        modules = {n.module for n in graph.nodes if n.id in nodes} if graph is not None else set()
        return sorted(modules & {pair.target for pair in self.syncs})

    async def check_fence(self) -> None:
        await asyncio.to_thread(check_fence, self.store, self.run, self.attempt)
