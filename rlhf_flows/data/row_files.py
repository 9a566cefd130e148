"""Files of rows, by path or URL: opened, and read whole or in part.

The decision here: a file that is too large to be sent travels by its name. Every process that reads
of it opens it itself, and sees first that it is there and as long as it was.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_flows.errors import DataError

__all__ = ["RowFile", "read_file"]

_STREAM_BYTES = 4 << 20
_BLOCK_BYTES = 256 << 10
"""Of an object, what one read fetches at least: neighbours are often asked for together."""
_KEPT_BLOCKS = 64


def read_file(name: str) -> bytes:
    """All of it. Raises DataError where it cannot be read."""
    with _translated(name):
        if "://" not in name:
            return Path(name).read_bytes()
        import fsspec  # only URLs need it

        with fsspec.open(name, "rb") as file:
            return bytes(file.read())


class RowFile:
    """A file of which parts are read, by path or URL. Pickles as its name and its size."""

    def __init__(self, name: str) -> None:
        """Raises DataError where there is no such file, or it cannot be asked."""
        self.is_remote = "://" in name
        self.name = name if self.is_remote else str(Path(name).absolute())
        self.size = 0
        self._opened: Any = None
        self.size = self._size_now()

    def __reduce__(self) -> tuple[Any, ...]:
        return _file_of, (self.name, self.size)

    def __del__(self) -> None:
        if isinstance(self._opened, int):
            os.close(self._opened)

    @property
    def stamp(self) -> tuple[int, int] | None:
        """Another one where the file changed; None where that cannot be told."""
        return None if self.is_remote else (self.size, os.stat(self.name).st_mtime_ns)

    def open_here(self) -> None:
        """Raises DataError where this machine cannot read it, or finds another one."""
        host = socket.gethostname()
        try:
            size = self._size_now()
        except DataError as e:
            raise DataError(
                f"{e} (on {host}). A file of this size is read by the workers themselves: put it"
                " where every node has it under this path, or on object storage (s3://…)"
            ) from e
        if size != self.size:
            raise DataError(
                f"{self.name} has {size} bytes on {host}, and had {self.size} when it was checked:"
                " every node must have the same file, and it may not change while a run uses it"
            )

    def open(self) -> Any:
        """As a file that can be read anywhere; of a local one its path."""
        with _translated(self.name):
            if not self.is_remote:
                return self.name
            filesystem, path = self._remote()
            return filesystem.open(path, "rb")

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """From the first byte to the last."""
        with _translated(self.name):
            if not self.is_remote:
                with open(self.name, "rb", buffering=_STREAM_BYTES) as file:
                    yield file
                return
            filesystem, path = self._remote()
            raw = filesystem.open(path, "rb", block_size=_STREAM_BYTES, cache_type="readahead")
            with io.BufferedReader(raw, _STREAM_BYTES) as buffered:
                yield buffered

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of it; fewer where it ends before."""
        with _translated(self.name):
            if not self.is_remote:
                if self._opened is None:
                    self._opened = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
                return os.pread(self._opened, end - start, start)
            if self._opened is None:
                self._opened = lru_cache(maxsize=_KEPT_BLOCKS)(self._block)
            blocks = range(start // _BLOCK_BYTES, -(-end // _BLOCK_BYTES))
            found = b"".join(self._opened(number) for number in blocks)
            return found[start - blocks.start * _BLOCK_BYTES :][: end - start]

    def _block(self, number: int) -> bytes:
        filesystem, path = self._remote()
        start = number * _BLOCK_BYTES
        end = min(start + _BLOCK_BYTES, self.size)
        return bytes(filesystem.cat_file(path, start=start, end=end))

    def _size_now(self) -> int:
        with _translated(self.name):
            if not self.is_remote:
                return os.stat(self.name).st_size
            filesystem, path = self._remote()
            filesystem.invalidate_cache()  # of listings
            return int(filesystem.size(path))

    def _remote(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # only URLs need it

        found: tuple[Any, str] = url_to_fs(self.name)
        return found


def _file_of(name: str, size: int) -> RowFile:
    file = RowFile.__new__(RowFile)
    file.is_remote, file.name, file.size, file._opened = "://" in name, name, size, None
    return file


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """What goes wrong with a file, as an error that says the next step."""
    try:
        yield
    except FileNotFoundError as e:
        if "://" in name:
            raise DataError(f"{name}: there is no such object: check bucket and key") from e
        raise DataError(f"{name}: there is no such file{_near_file(Path(name))}") from e
    except OSError as e:
        raise DataError(f"{name} cannot be read: {e.strerror or e}") from e
    except _errors_of(name) as e:
        if "://" not in name:
            raise
        raise DataError(f"{name} cannot be read: {e}") from e


def _errors_of(name: str) -> tuple[type[Exception], ...]:
    """Beside OSError; s3fs lets missing credentials and endpoints through untranslated."""
    if not name.startswith("s3://"):
        return (ImportError, ValueError)
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # then s3fs is missing, too, and says so itself
        return (ImportError, ValueError)
    return (ImportError, ValueError, BotoCoreError, ClientError)


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": {path.parent} is not a folder"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ""
