"""Folders in which files are made on their way to a store, and what killed processes left of them.

The decisions here: young is what was written to lately anywhere inside, so that a folder that
somebody still fills is left alone. And whoever fills one, a model's own code, cannot be repeated
from here: when its disk is full, room is waited for, and the error says that trying again will do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_flows.errors import StoreUnavailableError
from rlhf_flows.store.disk import DISK_FULL
from rlhf_flows.store.patience import Patience

__all__ = ["filled", "remove_old"]

_MARGIN_BYTES = 16 << 20


@contextmanager
def filled(folder: Path, patience: Patience) -> Iterator[Path]:
    """Around the filling of `folder`, which is gone afterwards.

    Should the disk be full, it raises `StoreUnavailableError` once there is room, or once the
    patience is over.
    """
    try:
        yield folder
    except Exception as error:
        if not _is_full(error):
            raise
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
        reason = f"cannot write {folder}: the disk is full: free some space"

        def look() -> None:
            # How much it would have become is not known: twice what fitted is a guess.
            if shutil.disk_usage(folder.parent).free < 2 * written + _MARGIN_BYTES:
                raise StoreUnavailableError(reason)

        patience.keep_trying(look)
        raise StoreUnavailableError(f"{reason} (there is some now)") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_full(error: BaseException) -> bool:
    # Writers in other languages, safetensors for one, keep the number to themselves.
    is_numbered = isinstance(error, OSError) and error.errno in DISK_FULL
    return is_numbered or os.strerror(errno.ENOSPC) in str(error)


def remove_old(
    parent: Path,
    start: str,
    *,
    before_s: float,
    unless: Callable[[str], bool] = lambda name: False,
) -> int:
    """Remove what lies in `parent`, is named `start…` and was last written to before `before_s`.

    Returns how many. Leaves alone what another user owns, and names that `unless` holds for.
    """
    count = 0
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(start)]
    for path in found:
        with suppress(OSError):  # it went, or it is not ours: nothing that has to be done now
            if unless(path.name) or _last_written_s(path) > before_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            count += 1
    return count


def _last_written_s(path: Path) -> float:
    """Unix time of the last change to a file, or to anything in a folder."""
    newest_s = path.lstat().st_mtime
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            newest_s = max(newest_s, (Path(folder) / name).lstat().st_mtime)
    return newest_s
