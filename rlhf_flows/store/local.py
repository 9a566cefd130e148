"""A folder of the local file system (or NFS) as a store.

The decision here: a temporary file beside its final name, fsync, `os.link`, fsync of the folder.
`link` is the one call that creates a name exclusively *and* with whole content: opening with "x"
is exclusive but shows half a file, `rename` is whole but overwrites. A writer killed at any
instant leaves at most temporary files and folders, which no listing shows and `sweep` removes.
A disk that is full, or does not answer, is waited for, file by file.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedWriter
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from rlhf_flows.errors import StoreError
from rlhf_flows.store.disk import on_disk
from rlhf_flows.store.objects import (
    FileRecord,
    Listing,
    ObjectInfo,
    check_key,
    folder_prefix,
    list_files,
)
from rlhf_flows.store.patience import BRIEF_S, Patience
from rlhf_flows.store.working import filled, remove_old

__all__ = ["LocalStore"]

T = TypeVar("T")
_TEMPORARY = ".tmp-"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_GONE = (FileNotFoundError, NotADirectoryError)


class LocalStore:
    """Objects as files below `root`."""

    def __init__(self, root: Path, *, retry_budget_s: float = BRIEF_S) -> None:
        self.root = root
        self._patience = Patience(retry_budget_s)

    def __reduce__(self) -> tuple[Callable[..., LocalStore], tuple[Path]]:
        return partial(LocalStore, retry_budget_s=self._patience.budget_s), (self.root,)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    @property
    def patience(self) -> Patience:
        return self._patience

    def check_usable(self) -> None:
        """Make the folder if need be; `StoreError` unless files can be made in it."""
        try:
            _make_folder(self.root)
            if not self.root.is_dir():
                raise StoreError(f"the store {self.root} is a file: name a folder instead")
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self.root} ({error.strerror}): name another folder, "
                "or have its permissions changed"
            ) from error

    def put_if_absent(self, key: str, data: bytes) -> bool:
        final = self.root / check_key(key)
        return self._patience.keep_trying(lambda: self._put_once(final, data))

    def _put_once(self, final: Path, data: bytes) -> bool:
        with on_disk("write", final):
            temporary = _write_temporary(final.parent, data)
            try:
                os.link(temporary, final)
                created = True
            except FileExistsError:
                created = False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise StoreError(
                        f"cannot write {final}: its file system has no hard links, by which files "
                        "are created whole and once: choose a folder on another one, or S3"
                    ) from error
                raise
            finally:
                temporary.unlink()
            # Also when the race is lost: the caller will rely on the winner's object.
            _sync_folder(final.parent)
        return created

    def get(self, key: str) -> bytes:
        path = self.root / check_key(key)
        return self._try("read", path, path.read_bytes)

    def list(self, prefix: str = "") -> Listing:
        below = folder_prefix(prefix)
        infos = [
            ObjectInfo(key=key, size=status.st_size, modified_s=status.st_mtime)
            for key, status in self._try("list", self.root / below, lambda: list(self._walk(below)))
            if not _is_temporary(key)
        ]
        return sorted(infos, key=lambda info: info.key)

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        """On the store's own file system, so that files need not be copied into the store."""
        folder = self.root / f"{_TEMPORARY}{uuid4().hex}"
        self._try("write", folder, lambda: folder.mkdir(parents=True, exist_ok=True))
        with filled(folder, self._patience):
            yield folder

    def put_folder(self, local: Path, prefix: str) -> tuple[FileRecord, ...]:
        base = self.root / check_key(prefix)
        is_ours = local.is_relative_to(self.root) and _is_temporary(
            local.relative_to(self.root).as_posix()
        )
        take = _link if is_ours else _copy
        files = list_files(local)
        # Other files may be: ranks that write one checkpoint together write to one prefix.
        if any((base / name).exists() for name, _ in files):
            raise StoreError(f"cannot upload to {base}: something is there already")
        folders = {(base / name).parent for name, _ in files}

        def take_one(source: Path, target: Path) -> None:
            self._try("write", target, lambda: take(source, target))

        # The disk takes its time: the digests are made meanwhile, from memory.
        with ThreadPoolExecutor(1) as beside:
            taken = [beside.submit(take_one, path, base / name) for name, path in files]
            records = tuple(FileRecord.of(path, name=name) for name, path in files)
            for file in taken:
                file.result()
        for folder in sorted(folders):
            self._try("write", folder, partial(_sync_folder, folder))
        return records

    def get_folder(self, prefix: str, files: Sequence[FileRecord], local: Path) -> None:
        for record in files:
            source = self.root / check_key(f"{prefix}/{record.name}")
            target = local / check_key(record.name)
            self._try("read", source, partial(_fetch, record, source, target))

    def delete(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self.root / check_key(key)
            self._remove(path)
            folders.add(path.parent)
        for folder in folders:
            self._remove_if_empty(folder)

    def sweep(self, prefix: str = "", *, older_than_s: float = 3600.0) -> int:
        before = time.time() - older_than_s
        below = folder_prefix(prefix)
        found = self._try("list", self.root / below, lambda: list(self._walk(below)))
        leftovers = [
            self.root / key
            for key, status in found
            # Those at the root, working folders among them, go as a whole.
            if f"/{_TEMPORARY}" in key and status.st_mtime <= before
        ]
        for path in leftovers:
            self._remove(path)
            if path.parent.name.startswith(_TEMPORARY):
                self._remove_if_empty(path.parent)
        return len(leftovers) + remove_old(self.root, _TEMPORARY, before_s=before)

    def _try(self, action: str, path: Path, call: Callable[[], T]) -> T:
        def once() -> T:
            with on_disk(action, path):
                return call()

        return self._patience.keep_trying(once)

    def _remove(self, path: Path) -> None:
        self._try("delete", path, lambda: path.unlink(missing_ok=True))

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        """Every file below, temporary ones too, as (key, status); one stat per file."""
        folders = [prefix]
        while folders:
            folder = folders.pop()
            # A folder or file that another process deletes meanwhile is simply not there.
            with suppress(*_GONE), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    with suppress(*_GONE):
                        if entry.is_dir():
                            folders.append(f"{folder}{entry.name}/")
                        else:
                            yield f"{folder}{entry.name}", entry.stat()

    def _remove_if_empty(self, folder: Path) -> None:
        """The folder and those above it, up to the first that holds something."""
        with suppress(OSError):
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


def _is_temporary(key: str) -> bool:
    return key.startswith(_TEMPORARY) or f"/{_TEMPORARY}" in key


def _write_temporary(folder: Path, data: bytes) -> Path:
    """A synced file in `folder` under a name that no listing shows."""
    path = folder / f"{_TEMPORARY}{uuid4().hex}"
    try:
        with _open_new(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _copy(source: Path, target: Path) -> None:
    """Synced; its name is not. Whole, or not there."""
    try:
        with _open_new(target) as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy, length=1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _link(source: Path, target: Path) -> None:
    """Synced; its name is not. Whoever wrote the file must be through with it."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    try:
        _in_folder(target.parent, lambda: os.link(source, target))
    except FileExistsError:
        # An earlier try took effect, and its answer was lost.
        if not target.samefile(source):
            raise


def _fetch(record: FileRecord, source: Path, target: Path) -> None:
    """Copy a file of the store; under its name only when it is what was committed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY}{uuid4().hex}")
    try:
        shutil.copyfile(source, temporary)
        record.verify(temporary, source=str(source))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _open_new(path: Path) -> BufferedWriter:
    return _in_folder(path.parent, lambda: path.open("xb"))


def _in_folder(folder: Path, make: Callable[[], T]) -> T:
    """What `make` returns, which needs the folder: `delete` may remove one that is empty again."""
    for _ in range(10):
        with suppress(FileNotFoundError):
            return make()
        with suppress(FileNotFoundError):
            _make_folder(folder)
    return make()


def _make_folder(folder: Path) -> None:
    """`mkdir -p` that survives a power cut: each new name is synced into its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
