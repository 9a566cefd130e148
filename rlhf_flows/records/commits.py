"""What a commit of an episode lists: the folders of weights and state that make a version real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_flows.store import FolderRecord

__all__ = ["CommittedFolder", "committed_folders"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedFolder:
    """One folder of a policy version."""

    version: int
    module: str
    """Which trained it, or which follows its average."""
    kind: Literal["weights", "state"]
    record: FolderRecord


def committed_folders(commit: Mapping[str, Any]) -> Iterator[CommittedFolder]:
    """Every folder that a payload of `trained.json` lists, averages of the weights too."""
    for name, entry in commit["checkpoints"].items():
        for module, part in ((name, entry), *entry.get("averages", {}).items()):
            for kind in ("weights", "state"):
                if part[kind] is not None:
                    yield CommittedFolder(
                        version=commit["version"],
                        module=module,
                        kind=kind,
                        record=FolderRecord.from_json(part[kind]),
                    )
