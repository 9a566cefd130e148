"""What killed attempts left behind in a run, and its removal.

The decision here: a folder of weights or state goes only when the commit of its version is there
and does not list it. Commits never change, so it cannot become real any more, whatever a zombie
does. A folder of a version that is not yet committed stays until a later sweep.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf_flows.errors import StoreError
from rlhf_flows.store.layout import RunLayout, parse_key
from rlhf_flows.store.objects import ObjectInfo, ObjectStore

__all__ = ["LeftoverFolder", "leftover_folders", "sweep_folders", "sweep_run"]

logger = logging.getLogger(__name__)


def sweep_run(store: ObjectStore, run: str, *, older_than_s: float = 3600.0) -> int:
    """Remove what no commit will ever need; the number of leftovers.

    Unfinished writes, working folders, and what `sweep_folders` finds. What the store refuses of
    one is left to a later sweep, and does not keep it from the other: an account that may delete
    objects need not be allowed to list uploads.
    """
    sweeps: tuple[Callable[[], int], ...] = (
        lambda: store.sweep(run, older_than_s=older_than_s),
        lambda: len(sweep_folders(store, run, older_than_s=older_than_s)),
    )
    count = 0
    for sweep in sweeps:
        try:
            count += sweep()
        except StoreError as error:
            logger.warning(
                "not all leftovers of run %r are swept, a later attempt will: %s", run, error
            )
    if count:
        logger.info("swept %d leftovers of killed attempts of run %r", count, run)
    return count


def sweep_folders(store: ObjectStore, run: str, *, older_than_s: float = 3600.0) -> list[str]:
    """Delete folders of weights and state that the commit of their version does not list.

    Returns their prefixes. Only those whose youngest file is older than `older_than_s`: nobody
    writes to them any more. There is no record of it, as there is of what retention deletes: they
    never were part of the run. And folders that have such a record, of any age: whoever wrote it
    was killed before it came to delete them, and nobody else ever would.
    """
    swept = []
    for folder in leftover_folders(store, run, older_than_s=older_than_s):
        if folder.kind != "uncommitted":
            store.delete(file.key for file in folder.files)
            swept.append(folder.prefix)
    return swept


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverFolder:
    """A folder of weights or state that no commit lists, or that was to be deleted."""

    prefix: str
    version: int
    kind: Literal["deleted", "unlisted", "uncommitted"]
    """Recorded as deleted, and still there; not in the commit of its version; of a version that has
    no commit: whoever makes one may list it yet."""
    files: tuple[ObjectInfo, ...]


def leftover_folders(
    store: ObjectStore, run: str, *, older_than_s: float = 3600.0
) -> list[LeftoverFolder]:
    """What there is of such folders; those that are not recorded as deleted only where their
    youngest file is older than `older_than_s`. Reads only.
    """
    layout = RunLayout(run)
    before_s = time.time() - older_than_s
    committed: set[int] = set()
    deleted: set[str] = set()
    folders: dict[tuple[int, str], list[ObjectInfo]] = {}
    for info in store.list(run):
        parts = parse_key(run, info.key)
        if parts is None:
            continue
        if parts.kind == "trained":
            committed.add(parts.episode + 1)
        elif parts.kind == "deleted":
            deleted.add(f"{run}/{parts.rest}")
        elif parts.kind in ("checkpoint_file", "weights_file"):
            prefix = info.key.removesuffix(f"/{parts.rest}")
            folders.setdefault((parts.version, prefix), []).append(info)

    commits: dict[int, bytes] = {}
    found = []
    for (version, prefix), files in folders.items():
        kind: Literal["deleted", "unlisted", "uncommitted"] = "deleted"
        if prefix not in deleted:
            if max(file.modified_s for file in files) > before_s:
                continue
            kind = "unlisted" if version in committed else "uncommitted"
            if kind == "unlisted" and version not in commits:
                commits[version] = store.get(layout.trained(version - 1))
            # Wherever the commit has it: what it says of a folder is not this room's business.
            if kind == "unlisted" and f'"{prefix}"'.encode() in commits[version]:
                continue
        found.append(LeftoverFolder(prefix=prefix, version=version, kind=kind, files=tuple(files)))
    return found
