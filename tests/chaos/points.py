"""Named points between every two durable effects, at which a process kills itself when told to.

A campaign writes one order into a folder: who dies, at which point, at its how-many-th visit. The
processes of a run install the points that are theirs; whoever first comes to the visit takes the
order (so it is carried out once) and sends itself SIGKILL: no handler, no flush, no farewell.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["POINTS", "RANK_POINTS", "Order", "Points"]

_STORED = {
    "flow": ("run", "attempt", "plan", "trained", "evaluation_done", "deleted"),
    "policy": ("rollout shard",),
    "reward": ("scoring shard", "evaluation_shard"),
}
POINTS: tuple[tuple[str, str], ...] = (
    *(
        (who, f"{when} {kind}")
        for who, kinds in _STORED.items()
        for kind in kinds
        for when in ("before", "after")
    ),
    # Inside the one primitive: the file is whole under a name of its own, or linked and not synced.
    ("policy", "inside rollout shard"),
    ("flow", "inside trained"),
    ("policy", "sampling"),
    ("policy", "in the middle of loading weights"),
    ("policy", "weights loaded"),
    ("reward", "scoring"),
    ("trainer", "before a step"),
    ("trainer", "in the middle of a step"),
    ("trainer", "after a step"),
    ("trainer", "before weights_file"),
    ("trainer", "inside weights_file"),
    ("trainer", "after weights_file"),
    ("trainer", "before checkpoint_file"),
    ("trainer", "inside checkpoint_file"),
    ("trainer", "after checkpoint_file"),
    ("trainer", "probing"),
    *(
        ("flow", f"{event} {phase}")
        for phase in ("rollout", "scoring", "training", "param_sync", "evaluation")
        for event in ("started", "finished")
    ),
    *(("flow", f"advanced {p}") for p in ("rollout", "scoring", "training", "evaluation")),
)
"""(who, where). Before and after are around the effect; after is before anybody hears of it."""

RANK_POINTS: tuple[tuple[str, str], ...] = (
    *(
        (who, where)
        for where in (
            "in the middle of a collective",
            "before a collective",
            "after a collective",
            "loading",
            "before a step",
            "in the middle of a step",
            "after a step",
            "giving weights",
            "in the middle of giving weights",
            "saving weights",
            "saving state",
            "probing",
            "taking weights",
        )
        for who in ("trainer", "trainer rank 1")
    ),
    # Rank 0 alone uploads.
    *(
        ("trainer", f"{when} {kind}")
        for kind in ("weights_file", "checkpoint_file")
        for when in ("before", "inside", "after")
    ),
)
"""Of a trainer of two ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    who: str
    point: str
    visit: int = 1

    def write(self, folder: Path) -> None:
        path = folder / f".{os.getpid()}"
        path.write_text(json.dumps(asdict(self)))
        path.rename(folder / "order.json")

    @staticmethod
    def carried_out(folder: Path) -> bool:
        return not (folder / "order.json").exists()


class Points:
    """The points of one process."""

    def __init__(self, who: str, folder: Path) -> None:
        self.who = who
        self.folder = folder
        self.run = folder.name
        self._visits: dict[str, int] = {}

    def reach(self, point: str) -> None:
        """Dies here, if this is the visit of the order."""
        visit = self._visits[point] = self._visits.get(point, 0) + 1
        try:
            order = Order(**json.loads((self.folder / "order.json").read_text()))
        except FileNotFoundError:
            return
        if (order.who, order.point) != (self.who, point) or visit < order.visit:
            return
        taken = self.folder / f"taken-{os.getpid()}.json"
        try:
            (self.folder / "order.json").rename(taken)
        except FileNotFoundError:
            return  # a sibling was faster
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Puts points around every write of a local store in this process."""
        from rlhf_flows.store import local

        store: Any = local.LocalStore
        put, put_folder, link = store.put_if_absent, store.put_folder, local.os.link

        def put_if_absent(own: Any, key: str, data: bytes) -> bool:
            kind = _kind(key)
            self.reach(f"before {kind}")
            created: bool = put(own, key, data)
            self.reach(f"after {kind}")
            return created

        def put_folder_(own: Any, folder: Path, prefix: str) -> Any:
            kind = _kind(f"{prefix}/x")
            self.reach(f"before {kind}")
            records = put_folder(own, folder, prefix)
            self.reach(f"after {kind}")
            return records

        def linked(source: Any, target: Any) -> None:
            link(source, target)
            key = str(target).partition(f"/{self.run}/")[2]
            self.reach(f"inside {_kind(f'{self.run}/{key}')}")

        store.put_if_absent, store.put_folder = put_if_absent, put_folder_
        local.os = _Os(local.os, linked)  # this module's view of it alone


class _Os:
    """The `os` of one module, with another `link`."""

    def __init__(self, os_: Any, link: Any) -> None:
        self._os = os_
        self.link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._os, name)


def _kind(key: str) -> str:
    from rlhf_flows.store.layout import parse_key

    parts = parse_key(key.partition("/")[0], key)
    if parts is None:
        return "other"
    return f"{parts.phase} shard" if parts.kind == "shard" else parts.kind
