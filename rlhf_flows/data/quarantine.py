"""Which samples of an episode are left out, and what is left of shards and batches. Pure.

The decision here: one record blames one sample, and its whole group goes with it, since an
algorithm on groups would otherwise see a group that nobody planned. Which samples a shard holds,
and which rows a training batch has, is a function of (plan, records): a record says in which phase
the sample was blamed, so that what an earlier phase made stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_flows.data.plan import EpisodePlan, GroupRef
from rlhf_flows.errors import DataDamageError

__all__ = ["Blamed", "Quarantine"]

_ORDER = ("rollout", "scoring")
"""Phases that leave samples out, in the order in which shards pass them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blamed:
    """One sample that ended or hung its worker again and again, alone."""

    sample_id: str
    phase: str
    module: str
    cause: str
    """What was seen when it was alone the last time."""

    def __str__(self) -> str:
        return f"{self.sample_id} in {self.module!r} ({self.cause})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> Blamed:
        """The record that `to_json` wrote; other keys are ignored. Raises DataDamageError."""
        try:
            return cls(**{name: str(payload[name]) for name in cls.__dataclass_fields__})
        except KeyError as e:
            raise DataDamageError(
                f"a quarantine record lacks {e}; it has the keys {sorted(payload)}: the object was"
                " not written by this system"
            ) from e


class Quarantine:
    """The blamed samples of one episode, and the groups that are left out with them. It grows."""

    def __init__(self, plan: EpisodePlan, blamed: Iterable[Blamed] = ()) -> None:
        self._plan = plan
        self._blamed: dict[str, Blamed] = {}
        self._group_of: dict[str, GroupRef] = {}
        for record in blamed:
            self.add(record)

    @property
    def blamed(self) -> tuple[Blamed, ...]:
        """By sample id."""
        return tuple(self._blamed[name] for name in sorted(self._blamed))

    def add(self, record: Blamed) -> None:
        """Leaves a sample and its group out. Raises DataDamageError for one that is not planned."""
        if not self._group_of:
            self._group_of = {
                name: GroupRef(shard.index, position)
                for shard in self._plan.shards
                for position, group in enumerate(self._plan.groups(shard.index))
                for name in group
            }
        if record.sample_id not in self._group_of:
            raise DataDamageError(
                f"a quarantine record of episode {self._plan.episode} names the sample"
                f" {record.sample_id}, which its plan does not have: it belongs to another run"
            )
        self._blamed[record.sample_id] = record

    def siblings(self, sample_id: str) -> tuple[str, ...]:
        """The whole group of a blamed sample."""
        ref = self._group_of[sample_id]
        return self._plan.groups(ref.shard)[ref.index]

    def groups(self, phase: str = "scoring") -> frozenset[GroupRef]:
        """The groups that shards of `phase` do without: blamed there, or before."""
        so_far = _ORDER[: _ORDER.index(phase) + 1]
        return frozenset(
            self._group_of[name] for name, r in self._blamed.items() if r.phase in so_far
        )

    def kept(self, phase: str, shard: int) -> tuple[tuple[str, ...], ...]:
        """Ids of the samples that a shard of `phase` holds, by group."""
        out = self.groups(phase)
        groups = self._plan.groups(shard)
        return tuple(g for i, g in enumerate(groups) if GroupRef(shard, i) not in out)

    def left_out(self, shards: Iterable[int]) -> frozenset[str]:
        """Ids of the samples of some shards that are not trained on."""
        wanted = set(shards)
        return frozenset(
            name
            for ref in self.groups()
            if ref.shard in wanted
            for name in self._plan.groups(ref.shard)[ref.index]
        )

    def num_left_out(self) -> int:
        """Samples of the episode that are not trained on."""
        return len(self.groups()) * self._plan.group_size

    def rows(self, batch: Sequence[GroupRef]) -> list[tuple[int, tuple[int, ...]]]:
        """(shard, its rows) of each group of a training batch, less the groups left out.

        Rows are counted in the shard without its left-out groups. A batch keeps its place whatever
        is left of it: it must not depend on what is still to be blamed in later shards.
        """
        out, size = self.groups(), self._plan.group_size
        rows = []
        for ref in batch:
            if ref in out:
                continue
            before = sum(other.shard == ref.shard and other.index < ref.index for other in out)
            first = (ref.index - before) * size
            rows.append((ref.shard, tuple(range(first, first + size))))
        return rows
