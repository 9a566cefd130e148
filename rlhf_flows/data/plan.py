"""Who samples what: the plan of an episode, and the order of its training batches. Pure.

The decision here: a plan is a function of (run seed, episode, dataset digest), and membership and
order of training batches are a function of the plan. So nothing that happens at run time (which
replica is quick, which shard comes first, on what machine) can change what is trained.

Departs from numpy's usual shuffles on purpose: `Generator.permutation` may change between versions
of numpy; the raw stream of a bit generator may not (NEP 19). Seeds come from blake2b, never from
Python's salted `hash`. No torch: the flow process plans without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_flows.errors import ConfigError, DataDamageError

__all__ = [
    "EpisodePlan",
    "GroupRef",
    "PlannedShard",
    "make_plan",
    "permutation",
    "sample_id",
    "sample_seed",
    "training_batches",
]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    index: int
    first_group: int
    """Position in the episode of the shard's first group."""
    rows: tuple[int, ...]
    """Dataset row of each group of the shard."""
    draws: tuple[int, ...] = ()
    """How many groups of this episode asked the same row before; () where none did."""
    numbers: tuple[int, ...] = ()
    """Position in the episode of each group, where they are not neighbours; else ()."""

    def draw(self, group: int) -> int:
        return self.draws[group] if self.draws else 0

    def number(self, group: int) -> int:
        """Position in the episode of a group of the shard."""
        return self.numbers[group] if self.numbers else self.first_group + group


@dataclass(frozen=True, slots=True, order=True)
class GroupRef:
    """One group of an episode: the index of its shard, and its position in that shard."""

    shard: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodePlan:
    """One wave of an episode, fixed before any work. `versions`: policy version of each module."""

    episode: int
    wave: int = 0
    run_seed: int
    group_size: int
    dataset_digest: str
    versions: Mapping[str, int]
    shards: tuple[PlannedShard, ...]

    @property
    def num_groups(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return self.num_groups * self.group_size

    def samples(self, shard: int) -> dict[str, list[Any]]:
        """The columns that the plan fixes, one row for each sample, siblings side by side."""
        planned = self.shards[shard]
        columns: dict[str, list[Any]] = {
            name: [] for name in ("sample_id", "group", "sibling", "prompt_row", "seed")
        }
        for position, row in enumerate(planned.rows):
            first_number = planned.draw(position) * self.group_size
            for sibling in range(self.group_size):
                name = sample_id(self.episode, row, first_number + sibling)
                columns["sample_id"].append(name)
                columns["group"].append(planned.number(position))
                columns["sibling"].append(sibling)
                columns["prompt_row"].append(row)
                columns["seed"].append(sample_seed(self.run_seed, self.episode, name))
        return columns

    def groups(self, shard: int) -> tuple[tuple[str, ...], ...]:
        """Ids of the samples of a shard, by group, in the order of `samples`."""
        planned = self.shards[shard]
        return tuple(
            tuple(
                sample_id(self.episode, row, planned.draw(position) * self.group_size + sibling)
                for sibling in range(self.group_size)
            )
            for position, row in enumerate(planned.rows)
        )

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dumps`, equal for equal plans; `from_json` is its inverse."""
        shards: list[dict[str, Any]] = []
        for shard in self.shards:
            entry: dict[str, Any] = {"first_group": shard.first_group, "rows": list(shard.rows)}
            if shard.draws:
                entry["draws"] = list(shard.draws)
            if shard.numbers:
                entry["numbers"] = list(shard.numbers)
            shards.append(entry)
        return {
            "format": _FORMAT,
            "episode": self.episode,
            "wave": self.wave,
            "run_seed": self.run_seed,
            "group_size": self.group_size,
            "dataset_digest": self.dataset_digest,
            "versions": dict(sorted(self.versions.items())),
            "shards": shards,
        }

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> EpisodePlan:
        """The plan that `to_json` wrote; other keys (a commit's nonce) are ignored.

        Raises DataDamageError for a payload that is no plan of this format.
        """
        if payload.get("format") != _FORMAT:
            raise DataDamageError(
                f"a plan of format {payload.get('format')!r} was found, this version reads format "
                f"{_FORMAT}: resume the run with the version that started it"
            )
        try:
            return cls(
                episode=payload["episode"],
                wave=payload["wave"],
                run_seed=payload["run_seed"],
                group_size=payload["group_size"],
                dataset_digest=payload["dataset_digest"],
                versions=dict(payload["versions"]),
                shards=tuple(
                    PlannedShard(
                        index=index,
                        first_group=entry["first_group"],
                        rows=tuple(entry["rows"]),
                        draws=tuple(entry.get("draws", ())),
                        numbers=tuple(entry.get("numbers", ())),
                    )
                    for index, entry in enumerate(payload["shards"])
                ),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise DataDamageError(
                f"a plan could not be read ({type(e).__name__}: {e}); it has the keys "
                f"{sorted(payload)}: the object was not written by this system, or is damaged"
            ) from e


def make_plan(
    *,
    run_seed: int,
    episode: int,
    num_rows: int,
    dataset_digest: str,
    sample_per_episode: int,
    group_size: int,
    groups_per_shard: int,
    shuffle: bool,
    versions: Mapping[str, int],
    parts: Sequence[int] = (),
    ratio: Sequence[int] = (),
    lengths: Sequence[int] = (),
) -> EpisodePlan:
    """Plan episode `episode`, its first wave.

    Dataset positions run on from episode to episode: each pass over the dataset is a permutation
    of its own, seeded by the pass, so that every row comes once a pass, wherever episodes end.
    Raises ConfigError for sizes that do not fit.

    Args:
        parts: Rows of each of several datasets, which stand one after another; each has passes of
            its own.
        ratio: Shares of the datasets in an episode, equal if not given.
        lengths: Of each row's prompt: shards then hold groups of about one length. What is trained
            together does not depend on it.
    """
    for name, value in (
        ("sample_per_episode", sample_per_episode),
        ("group_size", group_size),
        ("groups_per_shard", groups_per_shard),
        ("num_rows", num_rows),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    if episode < 0:
        raise ConfigError(f"episode is {episode}: episodes count from 0")
    if sample_per_episode % group_size:
        down = sample_per_episode // group_size * group_size
        near = " or ".join(str(n) for n in (down, down + group_size) if n)
        raise ConfigError(
            f"sample_per_episode={sample_per_episode} is not a multiple of "
            f"group_size={group_size}: it counts completions, and every prompt gets "
            f"{group_size}; use {near}"
        )
    num_groups = sample_per_episode // group_size
    positions = np.arange(episode * num_groups, (episode + 1) * num_groups, dtype=np.int64)
    parts = parts or (num_rows,)
    rows = _rows(positions, parts, ratio, run_seed=run_seed, shuffle=shuffle).tolist()
    draws = _draws(rows)
    order = list(range(num_groups))
    if lengths:
        order.sort(key=lambda group: lengths[rows[group]])  # stable: equal ones as they were
    shards = []
    for index, first in enumerate(range(0, num_groups, groups_per_shard)):
        groups = order[first : first + groups_per_shard]
        drawn = tuple(draws[group] for group in groups)
        shards.append(
            PlannedShard(
                index=index,
                first_group=first,
                rows=tuple(rows[group] for group in groups),
                draws=drawn if any(drawn) else (),
                numbers=tuple(groups) if lengths else (),
            )
        )
    return EpisodePlan(
        episode=episode,
        run_seed=run_seed,
        group_size=group_size,
        dataset_digest=dataset_digest,
        versions=dict(versions),
        shards=tuple(shards),
    )


def training_batches(
    plan: EpisodePlan,
    *,
    samples_per_batch: int,
    epoch: int,
    shuffle: bool,
    whole_batches: bool = False,
) -> list[list[GroupRef]]:
    """The batches of training pass `epoch` over the episode: every group once, in whole groups.

    With `shuffle` in another order each pass: the groups, or with `whole_batches` the batches, each
    of neighbours in the episode.
    A function of the plan alone, never of the order in which shards arrived; a group that is left
    out leaves its batch smaller (`Quarantine.rows`) and all others as they are. The last batch is
    smaller where the groups do not divide. Raises ConfigError unless `samples_per_batch` is a
    multiple of the group size.
    """
    if samples_per_batch < 1 or samples_per_batch % plan.group_size:
        raise ConfigError(
            f"a training batch of {samples_per_batch} samples cannot hold whole groups of "
            f"{plan.group_size}: use a multiple of group_size={plan.group_size}"
        )
    numbers = {GroupRef(s.index, i): s.number(i) for s in plan.shards for i in range(len(s.rows))}
    groups = sorted(numbers, key=numbers.__getitem__)
    key = (plan.run_seed, "training", plan.episode, plan.wave, epoch)
    if shuffle and not whole_batches:
        groups = [groups[i] for i in permutation(len(groups), *key)]
    width = samples_per_batch // plan.group_size
    batches = [groups[i : i + width] for i in range(0, len(groups), width)]
    if shuffle and whole_batches:
        batches = [batches[i] for i in permutation(len(batches), *key)]
    return batches


def _rows(
    positions: NDArray[np.int64],  # [n] groups since the run began
    parts: Sequence[int],
    ratio: Sequence[int],
    *,
    run_seed: int,
    shuffle: bool,
) -> NDArray[np.int64]:  # [n]
    """The dataset row at each position. Raises ConfigError for a ratio of other datasets."""
    if ratio and len(ratio) != len(parts):
        raise ConfigError(
            f"data_ratio has {len(ratio)} numbers for {len(parts)} datasets: give one for each"
        )
    ratio = ratio or (1,) * len(parts)
    pattern = np.array(_pattern(ratio), dtype=np.int64)
    cycles, slots = np.divmod(positions, len(pattern))
    chosen = pattern[slots]  # [n] which dataset
    rows = np.zeros_like(positions)
    start = 0
    for part, size in enumerate(parts):
        ours = chosen == part
        before = np.concatenate([[0], np.cumsum(pattern == part)])[slots[ours]]
        passes, own = np.divmod(cycles[ours] * ratio[part] + before, size)
        if shuffle:
            for number in np.unique(passes):
                key = ("dataset", int(number)) if part == 0 else ("dataset", int(number), part)
                here = passes == number
                own[here] = permutation(size, run_seed, *key)[own[here]]
        rows[ours] = start + own
        start += size
    return rows


def _pattern(ratio: Sequence[int]) -> list[int]:
    """Datasets in turn, each as often as its share, as evenly as it goes."""
    turns = [((2 * k + 1) / (2 * n), part) for part, n in enumerate(ratio) for k in range(n)]
    return [part for _, part in sorted(turns)]


def sample_id(episode: int, row: int, number: int) -> str:
    """`e000003-r000012-s02`. A row asked again in the episode counts on: s04 after groups of 4."""
    return f"e{episode:06d}-r{row:06d}-s{number:02d}"


def sample_seed(run_seed: int, episode: int, sample_id: str) -> int:
    """Seed of the sampler for one sample, in [0, 2**31)."""
    return _hash(run_seed, "sample", episode, sample_id) % 2**31


@lru_cache(maxsize=8)
def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """0 … size-1 in an order fixed by `key`, on every machine and version of numpy. Read-only."""
    stream = np.random.Philox(key=_hash(*key))
    order = np.argsort(stream.random_raw(size), kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def _hash(*key: int | str) -> int:
    # repr keeps 1 and "1" apart, the separator keeps ("a", "bc") and ("ab", "c") apart.
    text = "\x1f".join(repr(part) for part in key)
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def _draws(rows: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    draws = []
    for row in rows:
        draws.append(seen.get(row, 0))
        seen[row] = draws[-1] + 1
    return draws
