"""A folder of the local file system (or NFS) as a store.

The decision here: a temporary file beside its final name, fsync, `os.link`, fsync of the folder.
`link` is the one call that creates a name exclusively *and* with whole content: opening with "x"
is exclusive but shows half a file, `rename` is whole but overwrites. A writer killed at any
instant leaves at most temporary files and folders, which no listing shows and `sweep` removes.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from uuid import uuid4

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from rlhf_flows.store.objects import (
    FileRecord,
    Listing,
    ObjectInfo,
    check_key,
    folder_prefix,
    list_files,
)

__all__ = ["LocalStore"]

_TEMPORARY = ".tmp-"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_GONE = (FileNotFoundError, NotADirectoryError)
_MAY_PASS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE, errno.ENFILE}


class LocalStore:
    """Objects as files below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        return LocalStore, (self.root,)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    @property
    def url(self) -> str:
        return f"file://{self.root}"

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
        with _explained("write", final):
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
        with _explained("read", path):
            return path.read_bytes()

    def list(self, prefix: str = "") -> Listing:
        with _explained("list", self.root / prefix):
            infos = [
                ObjectInfo(key=key, size=status.st_size)
                for key, status in self._walk(folder_prefix(prefix))
                if not _is_temporary(key)
            ]
        return sorted(infos, key=lambda info: info.key)

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        """On the store's own file system, so that files need not be copied into the store."""
        folder = self.root / f"{_TEMPORARY}{uuid4().hex}"
        with _explained("write", folder):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put_folder(self, local: Path, prefix: str) -> tuple[FileRecord, ...]:
        base = self.root / check_key(prefix)
        is_ours = local.is_relative_to(self.root) and _is_temporary(
            local.relative_to(self.root).as_posix()
        )
        take = _link if is_ours else _copy
        with _explained("write", base):
            if base.exists():
                raise StoreError(f"cannot upload to {base}: something is there already")
            files = list_files(local)
            folders = {(base / name).parent for name, _ in files}
            for folder in sorted(folders):
                _make_folder(folder)
            # The disk takes its time: the digests are made meanwhile, from memory.
            with ThreadPoolExecutor(1) as beside:
                taken = [beside.submit(take, path, base / name) for name, path in files]
                records = tuple(FileRecord.of(path, name=name) for name, path in files)
                for file in taken:
                    file.result()
            for folder in folders:
                _sync_folder(folder)
        return records

    def get_folder(self, prefix: str, files: Sequence[FileRecord], local: Path) -> None:
        for record in files:
            source = self.root / check_key(f"{prefix}/{record.name}")
            target = local / check_key(record.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{_TEMPORARY}{uuid4().hex}")
            try:
                with _explained("read", source):
                    shutil.copyfile(source, temporary)
                record.verify(temporary, source=str(source))
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self.root / check_key(key)
            with _explained("delete", path):
                path.unlink(missing_ok=True)
            folders.add(path.parent)
        for folder in folders:
            self._remove_if_empty(folder)

    def sweep(self, prefix: str = "", *, older_than_s: float = 3600.0) -> int:
        before = time.time() - older_than_s
        leftovers = [
            self.root / key
            for key, status in self._walk(folder_prefix(prefix))
            if _is_temporary(key) and status.st_mtime <= before
        ]
        for path in leftovers:
            with _explained("delete", path):
                path.unlink(missing_ok=True)
            if path.parent.name.startswith(_TEMPORARY):
                self._remove_if_empty(path.parent)
        return len(leftovers)

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


@contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    """Translate what the operating system says into an error of ours."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ObjectNotFoundError(f"cannot {action} {path}: there is no such object") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            reason = f"cannot {action} {path}: the disk is full: free some space, then resume"
            raise StoreUnavailableError(reason) from error
        kind = StoreUnavailableError if error.errno in _MAY_PASS else StoreError
        raise kind(f"cannot {action} {path}: {error.strerror}") from error


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
    """Synced; its name is not."""
    with _open_new(target) as copy, source.open("rb") as original:
        shutil.copyfileobj(original, copy, length=1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def _link(source: Path, target: Path) -> None:
    """Synced; its name is not. Whoever wrote the file must be through with it."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.link(source, target)


def _open_new(path: Path) -> BufferedWriter:
    # A loop, because `delete` may remove an emptied folder between the two calls.
    for _ in range(10):
        with suppress(FileNotFoundError):
            return path.open("xb")
        _make_folder(path.parent)
    return path.open("xb")


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
