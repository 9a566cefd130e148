"""What exists of a run, hence what is missing: resume as a pure function of one listing.

The decision here: nothing is read. Keys alone say which shards count, which episodes are trained,
which evaluations are done; so scanning costs one listing however large the shards are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlhf_flows.store.layout import KeyParts, ShardPhase, parse_key
from rlhf_flows.store.objects import ObjectStore

__all__ = ["EpisodeState", "EvaluationState", "RunState", "scan", "scan_keys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeState:
    """What exists of one episode."""

    episode: int
    plans: Mapping[int, int]
    """Wave that is planned -> generation of the plan that counts."""
    rollout: Mapping[int, str]
    """Shard index -> key of the generation that counts."""
    scoring: Mapping[int, str]
    quarantined: tuple[str, ...]
    """Sample ids, of the plan that counts."""
    trained: bool
    damaged: Mapping[tuple[ShardPhase, int], int]
    """(phase, shard index) -> newest generation that is known to be damaged."""

    def next_generation(self, phase: ShardPhase, index: int) -> int:
        """The generation under which a missing shard is to be written."""
        return self.damaged.get((phase, index), -1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationState:
    """What exists of one evaluation of one policy version."""

    shards: Mapping[int, str]
    """Shard index -> key of the generation that counts."""
    done: bool
    damaged: Mapping[int, int] = field(default_factory=dict)
    """Shard index -> newest generation that is known to be damaged."""

    def next_generation(self, index: int) -> int:
        """The generation under which a missing shard is to be written."""
        return self.damaged.get(index, -1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What exists of a run."""

    exists: bool
    """Whether there is a `run.json`."""
    attempts: tuple[int, ...]
    episodes: Mapping[int, EpisodeState]
    evaluations: Mapping[tuple[int, str], EvaluationState]
    """By (policy version, digest of the evaluation)."""
    deleted: frozenset[str]
    """Prefixes of checkpoints and weights that retention has deleted, or began to."""

    @property
    def trained_episodes(self) -> int:
        """How many episodes in a row, from the first, are trained."""
        count = 0
        while (state := self.episodes.get(count)) is not None and state.trained:
            count += 1
        return count

    def episode(self, number: int) -> EpisodeState:
        """The state of one episode; empty if nothing of it exists."""
        return self.episodes.get(number) or _Episode().state(number)


def scan(store: ObjectStore, run: str) -> RunState:
    """One listing of the run, no reads."""
    return scan_keys(run, (info.key for info in store.list(run)))


def scan_keys(run: str, keys: Iterable[str]) -> RunState:
    """Pure: the same for the same keys, in any order. Keys of anything else are ignored."""
    attempts: list[int] = []
    episodes: dict[int, _Episode] = {}
    evaluations: dict[tuple[int, str], _Evaluation] = {}
    deleted: set[str] = set()
    exists = False
    for key in keys:
        parts = parse_key(run, key)
        match parts:
            case None:
                continue
            case KeyParts(kind="run"):
                exists = True
            case KeyParts(kind="attempt"):
                attempts.append(parts.number)
            case KeyParts(kind="deleted"):
                deleted.add(f"{run}/{parts.rest}")
            case KeyParts(kind="evaluation_shard" | "evaluation_tombstone" | "evaluation_done"):
                which = parts.version, parts.word
                evaluations.setdefault(which, _Evaluation()).add(parts, key)
            case KeyParts() if parts.episode >= 0:
                episodes.setdefault(parts.episode, _Episode()).add(parts, key)
    return RunState(
        exists=exists,
        attempts=tuple(sorted(attempts)),
        episodes={number: episodes[number].state(number) for number in sorted(episodes)},
        evaluations={which: found.state() for which, found in sorted(evaluations.items())},
        deleted=frozenset(deleted),
    )


@dataclass(slots=True)
class _Generations:
    """The shards of one phase, or of one evaluation, and which generation of each counts."""

    newest: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Shard index -> newest generation and its key."""
    damaged: dict[int, int] = field(default_factory=dict)
    """Shard index -> newest generation that has a tombstone."""

    def add(self, parts: KeyParts, key: str) -> None:
        if parts.generation >= self.newest.get(parts.index, (0, ""))[0]:
            self.newest[parts.index] = parts.generation, key

    def bury(self, parts: KeyParts) -> None:
        self.damaged[parts.index] = max(parts.generation, self.damaged.get(parts.index, 0))

    def counting(self) -> dict[int, str]:
        return {
            index: key
            for index, (generation, key) in sorted(self.newest.items())
            if generation > self.damaged.get(index, -1)
        }


@dataclass(slots=True)
class _Evaluation:
    """What a scan has seen of one evaluation so far."""

    shards: _Generations = field(default_factory=_Generations)
    done: bool = False

    def add(self, parts: KeyParts, key: str) -> None:
        match parts.kind:
            case "evaluation_shard":
                self.shards.add(parts, key)
            case "evaluation_tombstone":
                self.shards.bury(parts)
            case "evaluation_done":
                self.done = True

    def state(self) -> EvaluationState:
        return EvaluationState(
            shards=self.shards.counting(), done=self.done, damaged=self.shards.damaged
        )


@dataclass(slots=True)
class _Episode:
    """What a scan has seen of one episode so far."""

    plans: dict[int, int] = field(default_factory=dict)
    quarantined: list[tuple[int, str]] = field(default_factory=list)
    """(generation of the plan, sample id)."""
    trained: bool = False
    shards: dict[ShardPhase, _Generations] = field(
        default_factory=lambda: {"rollout": _Generations(), "scoring": _Generations()}
    )

    def add(self, parts: KeyParts, key: str) -> None:
        match parts.kind:
            case "plan":
                self.plans[parts.wave] = max(parts.generation, self.plans.get(parts.wave, 0))
            case "quarantine":
                self.quarantined.append((parts.generation, parts.word))
            case "trained":
                self.trained = True
            case "tombstone" if parts.phase:
                self.shards[parts.phase].bury(parts)
            case "shard" if parts.phase:
                self.shards[parts.phase].add(parts, key)

    def state(self, episode: int) -> EpisodeState:
        planned = self.plans.get(0, 0)
        return EpisodeState(
            episode=episode,
            plans=dict(sorted(self.plans.items())),
            rollout=self.shards["rollout"].counting(),
            scoring=self.shards["scoring"].counting(),
            quarantined=tuple(
                sorted(word for generation, word in self.quarantined if generation == planned)
            ),
            trained=self.trained,
            damaged={
                (phase, index): generation
                for phase, shards in self.shards.items()
                for index, generation in shards.damaged.items()
            },
        )
