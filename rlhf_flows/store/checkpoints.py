"""Folders of files in the store: checkpoints and exported weights.

The decision here: a folder goes up under a prefix of its own and is nothing until a commit lists
its `FolderRecord`, sizes and digests included. So a half-written checkpoint cannot be picked, and
a flipped bit cannot be trained on. What is deleted is recorded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_flows.errors import StoreDamageError
from rlhf_flows.store.commit import commit_json
from rlhf_flows.store.layout import RunLayout
from rlhf_flows.store.objects import FileRecord, ObjectStore, check_key

__all__ = ["FolderRecord", "delete_folder", "fetch_folder", "upload_folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRecord:
    """A folder in the store, as a commit lists it."""

    prefix: str
    files: Sequence[FileRecord]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "files": [file.to_json() for file in self.files]}

    @classmethod
    def from_json(cls, payload: dict[str, Any]) -> FolderRecord:
        try:
            files = tuple(FileRecord.from_json(file) for file in payload["files"])
            return cls(prefix=check_key(payload["prefix"]), files=files)
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreDamageError(
                f"{payload!r:.200} is no record of a folder ({type(error).__name__}: {error})"
            ) from error


def upload_folder(store: ObjectStore, prefix: str, local: Path) -> FolderRecord:
    """Upload all files below `local` to a prefix with a uuid that is used only here, or also by
    other ranks that write their part of the folder.
    """
    return FolderRecord(prefix=prefix, files=store.put_folder(local, prefix))


def fetch_folder(store: ObjectStore, record: FolderRecord, local: Path) -> None:
    """Download the folder, each file verified before it stands at its name.

    Raises `StoreDamageError` for a file that is not what was committed, `ObjectNotFoundError` for
    one that is gone.
    """
    store.get_folder(record.prefix, record.files, local)


def delete_folder(store: ObjectStore, layout: RunLayout, record: FolderRecord, reason: str) -> None:
    """Delete a folder for good. That it is gone, and why, stands in the store before it goes."""
    commit_json(
        store,
        layout.deleted(record.prefix),
        {
            "reason": reason,
            "deleted_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **record.to_json(),
        },
    )
    store.delete(f"{record.prefix}/{file.name}" for file in record.files)
