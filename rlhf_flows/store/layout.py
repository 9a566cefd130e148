"""Where everything of a run lies: the key of each object, and back from a key to what it is.

The decision here: a key says all that a listing has to tell (phase, episode, shard, version), so
that resume needs no reads. Numbers are padded, names are Hive-style, and one key has one spelling:
`parse_key` is the exact inverse of the methods of `RunLayout`, and knows nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rlhf_flows.errors import ConfigError, StoreError

__all__ = ["KeyParts", "Kind", "RunLayout", "ShardPhase", "check_run_name", "parse_key"]

ShardPhase = Literal["rollout", "scoring"]
Kind = Literal[
    "run",
    "attempt",
    "attempt_ended",
    "plan",
    "quarantine",
    "shard",
    "tombstone",
    "trained",
    "checkpoint_file",
    "weights_file",
    "evaluation_shard",
    "evaluation_tombstone",
    "evaluation_done",
    "deleted",
]


def check_run_name(name: str) -> str:
    """The name itself, if a run may be called so; it becomes one folder of the store."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ConfigError(
            f"a run cannot be named {name!r}: use 1 to 128 letters, digits, '.', '_' and '-', the "
            "first one a letter or a digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Every key of one run."""

    run: str

    def __post_init__(self) -> None:
        check_run_name(self.run)

    @property
    def run_json(self) -> str:
        return f"{self.run}/run.json"

    @property
    def attempts_prefix(self) -> str:
        return f"{self.run}/attempts"

    def attempt(self, number: int) -> str:
        return f"{self.attempts_prefix}/{number:06d}.json"

    def attempt_ended(self, number: int) -> str:
        return f"{self.attempts_prefix}/{number:06d}.ended.json"

    def plan(self, episode: int, wave: int = 0, generation: int = 0) -> str:
        """A later generation replaces the one before, whose shards have tombstones by then."""
        name = f"plan-{wave:02d}.g{generation}" if generation else f"plan-{wave:02d}"
        return f"{self._episode(episode)}/{name}.json"

    def quarantine(self, episode: int, sample_id: str, plan_generation: int = 0) -> str:
        """A record holds for the generation of the plan that named the sample, and for no other."""
        name = _check_word(sample_id) + (f".g{plan_generation}" if plan_generation else "")
        return f"{self._episode(episode)}/quarantine/{name}.json"

    def shard(self, phase: ShardPhase, episode: int, index: int, generation: int = 0) -> str:
        return f"{self._shard(phase, episode, index, generation)}.parquet"

    def tombstone(self, phase: ShardPhase, episode: int, index: int, generation: int = 0) -> str:
        """Says that this generation of the shard is damaged, and that the next one counts."""
        return f"{self._shard(phase, episode, index, generation)}.tombstone.json"

    def trained(self, episode: int) -> str:
        return f"{self._episode(episode)}/trained.json"

    def checkpoint_prefix(self, version: int, uid: str) -> str:
        return f"{self.run}/checkpoints/version={version:06d}/{_check_word(uid)}"

    def weights_prefix(self, version: int, uid: str) -> str:
        return f"{self.run}/weights/version={version:06d}/{_check_word(uid)}"

    def version_of_weights(self, prefix: str) -> int | None:
        """The policy version whose weights are the folder at `prefix`; None for other folders."""
        match = _WEIGHTS_FOLDER.fullmatch(prefix.removeprefix(f"{self.run}/"))
        return None if match is None else int(match["version"])

    def evaluation_prefix(self, version: int, digest: str) -> str:
        return f"{self.run}/evaluations/version={version:06d}/eval={_check_word(digest)}"

    def evaluation_shard(self, version: int, digest: str, index: int, generation: int = 0) -> str:
        name = _shard_name(index, generation)
        return f"{self.evaluation_prefix(version, digest)}/{name}.parquet"

    def evaluation_tombstone(
        self, version: int, digest: str, index: int, generation: int = 0
    ) -> str:
        name = _shard_name(index, generation)
        return f"{self.evaluation_prefix(version, digest)}/{name}.tombstone.json"

    def evaluation_done(self, version: int, digest: str) -> str:
        return f"{self.evaluation_prefix(version, digest)}/done.json"

    def deleted(self, prefix: str) -> str:
        """The record that the folder at `prefix`, a checkpoint or weights, was deleted."""
        return f"{self.run}/deleted/{prefix.removeprefix(f'{self.run}/')}.json"

    def _episode(self, episode: int) -> str:
        return f"{self.run}/episodes/episode={episode:06d}"

    def _shard(self, phase: ShardPhase, episode: int, index: int, generation: int) -> str:
        return f"{self._episode(episode)}/{phase}/{_shard_name(index, generation)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyParts:
    """What a key says. Only the fields of its kind are set."""

    kind: Kind
    number: int = -1
    """Of an attempt."""
    episode: int = -1
    wave: int = -1
    phase: ShardPhase | None = None
    index: int = -1
    generation: int = 0
    version: int = -1
    word: str = ""
    """Sample id, digest of an evaluation, or uid of a folder."""
    rest: str = ""
    """Name of a file in a folder; of a deleted folder, its prefix below the run."""


def parse_key(run: str, key: str) -> KeyParts | None:
    """What the object at `key` is; None if it is nothing that this layout writes."""
    head, _, below = key.partition("/")
    if head != run:
        return None
    for kind, pattern in _PATTERNS.get(below.partition("/")[0], ()):
        if match := pattern.fullmatch(below):
            fields = match.groupdict()
            numbers = {
                name: int(fields.pop(name))
                for name in ("number", "episode", "wave", "index", "generation", "version")
                if fields.get(name) is not None
            }
            words = {name: value for name, value in fields.items() if value is not None}
            return KeyParts(kind=kind, **numbers, **words)  # type: ignore[arg-type]
    return None


def _shard_name(index: int, generation: int) -> str:
    return f"shard-{index:05d}.g{generation}" if generation else f"shard-{index:05d}"


def _check_word(word: str) -> str:
    if not re.fullmatch(_WORD, word):
        raise StoreError(f"{word!r} cannot be part of a key: use letters, digits, '_' and '-'")
    return word


_WORD = r"[A-Za-z0-9_-]+"


def _number(name: str, width: int) -> str:
    """A number as `:0{width}d` writes it, and in no other spelling."""
    return rf"(?P<{name}>\d{{{width}}}|[1-9]\d{{{width},}})"


def _word(name: str) -> str:
    return rf"(?P<{name}>{_WORD})"


_EPISODE = rf"episodes/episode={_number('episode', 6)}"
_SHARD = rf"shard-{_number('index', 5)}"
_PHASE = r"(?P<phase>rollout|scoring)"
_GENERATION = r"(?:\.g(?P<generation>[1-9]\d*))?"
_FOLDER = rf"version={_number('version', 6)}/{_word('word')}"
_EVALUATION = rf"evaluations/version={_number('version', 6)}/eval={_word('word')}"

_SPELLINGS: tuple[tuple[Kind, str], ...] = (
    ("run", r"run\.json"),
    ("attempt", rf"attempts/{_number('number', 6)}\.json"),
    ("attempt_ended", rf"attempts/{_number('number', 6)}\.ended\.json"),
    ("shard", rf"{_EPISODE}/{_PHASE}/{_SHARD}{_GENERATION}\.parquet"),
    ("tombstone", rf"{_EPISODE}/{_PHASE}/{_SHARD}{_GENERATION}\.tombstone\.json"),
    ("plan", rf"{_EPISODE}/plan-{_number('wave', 2)}{_GENERATION}\.json"),
    ("trained", rf"{_EPISODE}/trained\.json"),
    ("quarantine", rf"{_EPISODE}/quarantine/{_word('word')}{_GENERATION}\.json"),
    ("checkpoint_file", rf"checkpoints/{_FOLDER}/(?P<rest>.+)"),
    ("weights_file", rf"weights/{_FOLDER}/(?P<rest>.+)"),
    ("evaluation_shard", rf"{_EVALUATION}/{_SHARD}{_GENERATION}\.parquet"),
    ("evaluation_tombstone", rf"{_EVALUATION}/{_SHARD}{_GENERATION}\.tombstone\.json"),
    ("evaluation_done", rf"{_EVALUATION}/done\.json"),
    ("deleted", rf"deleted/(?P<rest>(?:checkpoints|weights)/{_FOLDER})\.json"),
)
_WEIGHTS_FOLDER = re.compile(rf"weights/{_FOLDER}", re.ASCII)
# By first folder, so that a shard's key is not held against the patterns of checkpoints.
_PATTERNS: dict[str, list[tuple[Kind, re.Pattern[str]]]] = {}
for _kind, _spelling in _SPELLINGS:
    _first = _spelling.partition("/")[0].replace("\\", "")
    _PATTERNS.setdefault(_first, []).append((_kind, re.compile(_spelling, re.ASCII)))
