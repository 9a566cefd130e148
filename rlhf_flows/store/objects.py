"""What a store is: named bytes that never change once they are there.

The decision here: one primitive, `put_if_absent`, carries every promise of the system (who owns an
attempt, which shard counts, what was trained). It is a Protocol, so that a local folder and an S3
bucket are two small classes and a test can be a third. Knows nothing of runs or episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_flows.errors import StoreDamageError, StoreError
from rlhf_flows.store.patience import Patience

__all__ = [
    "FileRecord",
    "Listing",
    "ObjectInfo",
    "ObjectStore",
    "check_key",
    "folder_prefix",
    "list_files",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One line of a listing."""

    key: str
    size: int
    """Bytes."""
    modified_s: float
    """Unix time, by the clock of the store."""


# Has a name because a class with a method `list` cannot write `list[ObjectInfo]` below it.
Listing = list[ObjectInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a folder in the store, as the commit that makes the folder real lists it."""

    name: str
    """Path below the folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str

    @classmethod
    def of(cls, path: Path, *, name: str) -> FileRecord:
        """Read the file at `path` and say what it is."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(name=name, size=path.stat().st_size, sha256=digest)

    def verify(self, path: Path, *, source: str) -> None:
        """Raise `StoreDamageError` unless the file at `path`, fetched from `source`, is this."""
        found = FileRecord.of(path, name=self.name)
        if found != self:
            raise StoreDamageError(
                f"{source} is not what was committed: {found.size} bytes with sha256 "
                f"{found.sha256[:12]}… instead of {self.size} with {self.sha256[:12]}…: "
                "restore it from a copy, or resume from an older checkpoint"
            )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, payload: dict[str, Any]) -> FileRecord:
        name = check_key(payload["name"])
        return cls(name=name, size=payload["size"], sha256=payload["sha256"])


class ObjectStore(Protocol):
    """Named bytes. Safe to use from many threads; pickles as its URL alone, never with secrets.

    Errors: `StoreUnavailableError` for what may pass, after each request was repeated as long as
    the store's `patience` allows; any other `StoreError`, at once, for what will not.
    """

    @property
    def patience(self) -> Patience:
        """For how long this store is waited for."""

    @property
    def url(self) -> str:
        """`file:///path` or `s3://bucket/prefix`; `open_store` takes it back."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create the object whole, or not at all. True: this call did. False: one is there.

        After an exception, and after False, the object may still be this caller's own (a reply was
        lost, and the PUT repeated): `commit_json` and `commit_bytes` settle that by reading it
        back.
        """

    def get(self, key: str) -> bytes:
        """All bytes of one object; `ObjectNotFoundError` if there is none."""

    def list(self, prefix: str = "") -> Listing:
        """Every object below the folder `prefix`, sorted by key, never stale."""

    def working_folder(self) -> AbstractContextManager[Path]:
        """An empty local folder to make files in that `put_folder` will take, gone afterwards."""

    def put_folder(self, local: Path, prefix: str) -> tuple[FileRecord, ...]:
        """Upload every file below `local` under a prefix where nobody else ever writes files of
        these names.

        Plain writes: the folder is real only once a commit lists these records. Files in a
        `working_folder` of this store need not be copied: they are not to be written to again.
        """

    def get_folder(self, prefix: str, files: Sequence[FileRecord], local: Path) -> None:
        """Download into `local`. A file that stands at its name was verified: size and sha256."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""

    def sweep(self, prefix: str = "", *, older_than_s: float = 3600.0) -> int:
        """Remove what killed writers left unfinished below `prefix`; the number of leftovers.

        Also their working folders, whatever the prefix.
        """


def check_key(key: str) -> str:
    """The key itself, if it is a plain relative path that cannot leave the store."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key or not key.isprintable():
        raise StoreError(f"{key!r} cannot be a key of a store: use a/relative/path without '..'")
    return key


def folder_prefix(prefix: str) -> str:
    """`a/b` as the string that every key below it starts with: `a/b/`; empty for the store."""
    stripped = prefix.strip("/")
    return f"{check_key(stripped)}/" if stripped else ""


def list_files(local: Path) -> list[tuple[str, Path]]:
    """Every file below `local` as (name, path), sorted by name; `StoreError` if there is none."""
    paths = (path for path in local.rglob("*") if path.is_file())
    files = sorted((path.relative_to(local).as_posix(), path) for path in paths)
    if not files:
        raise StoreError(f"nothing to upload in {local}: it holds no file")
    return files
