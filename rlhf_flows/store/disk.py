"""What the operating system says of a file, as an error of ours: which faults of a disk may pass.

For files of a local store, and for those that folders of any store are fetched into.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError

__all__ = ["DISK_FULL", "on_disk"]

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_MAY_PASS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE, errno.ENFILE}


@contextmanager
def on_disk(action: str, path: Path) -> Iterator[None]:
    """Translate what goes wrong inside: `action`, such as "write", is done to `path`."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ObjectNotFoundError(f"cannot {action} {path}: there is no such object") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            reason = f"cannot {action} {path}: the disk is full: free some space"
            raise StoreUnavailableError(reason) from error
        kind = StoreUnavailableError if error.errno in _MAY_PASS else StoreError
        raise kind(f"cannot {action} {path}: {error.strerror}") from error
