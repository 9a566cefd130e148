"""What of a run nobody will need again, and its removal.

The decision here: what an attempt that may be alive could still commit is not touched. Beside one,
only that goes which the attempt's own sweep would take: folders that the commit of their version
does not list, and commits never change. Once no attempt may live, folders of versions that were
never committed go as well, and what retention would have deleted had the run not ended before.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf_flows.records.commits import committed_folders
from rlhf_flows.records.finding import find_run
from rlhf_flows.store import (
    FolderRecord,
    ObjectStore,
    RunLayout,
    RunState,
    attempt_that_may_live,
    delete_folder,
    leftover_folders,
    read_json,
    sweep_run,
)
from rlhf_flows.tasks.retention import Retention, best_versions, milestones

__all__ = ["Leftover", "Leftovers", "collect_leftovers", "find_leftovers"]

Kind = Literal["deleted", "unlisted", "uncommitted", "retention"]

WHY: Mapping[Kind, str] = {
    "deleted": "recorded as deleted, by somebody who was killed meanwhile",
    "unlisted": "the commit of its version does not list it",
    "uncommitted": "its version was never committed, and no attempt lives",
    "retention": "older than runtime.keep_last, and nobody names it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """One folder of weights or training state that may go."""

    prefix: str
    version: int
    kind: Kind
    num_files: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What may go of a run now."""

    run: str
    url: str
    folders: tuple[Leftover, ...]
    kept_for: str
    """Who may still commit something, so that no more was looked for; "" if nobody."""

    @property
    def size_bytes(self) -> int:
        return sum(folder.size_bytes for folder in self.folders)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "size_bytes": self.size_bytes}


def find_leftovers(
    store: ObjectStore, run: str, *, older_than_s: float = 3600.0, assume_dead: bool = False
) -> Leftovers:
    """What may go; reads only.

    Args:
        older_than_s: Folders that no commit lists only where nothing was written to them for so
            long.
        assume_dead: The newest attempt, which has not ended and runs on another host where its
            process cannot be looked for, is dead. One that is plainly alive here stays alive.

    Raises:
        ConfigError: no such run.
    """
    state = find_run(store, run)
    kept_for = _living(store, run, assume_dead=assume_dead)
    found = [
        Leftover(
            prefix=folder.prefix,
            version=folder.version,
            kind=folder.kind,
            num_files=len(folder.files),
            size_bytes=sum(file.size for file in folder.files),
        )
        for folder in leftover_folders(store, run, older_than_s=older_than_s)
        if folder.kind != "uncommitted" or not kept_for
    ]
    if not kept_for:
        found += [_old(record) for record in _retired(store, run, state)]
    return Leftovers(run=run, url=f"{store.url}/{run}", folders=tuple(found), kept_for=kept_for)


def collect_leftovers(
    store: ObjectStore, run: str, *, older_than_s: float = 3600.0, assume_dead: bool = False
) -> Leftovers:
    """Deletes what `find_leftovers` finds, and unfinished writes that are as old; what it was."""
    found = find_leftovers(store, run, older_than_s=older_than_s, assume_dead=assume_dead)
    retired = {folder.prefix for folder in found.folders if folder.kind == "retention"}
    for record in _retired(store, run, find_run(store, run)) if retired else ():
        if record.prefix in retired:
            delete_folder(store, RunLayout(run), record, "retention by rlhf-flows gc")
    for folder in found.folders:
        if folder.kind == "uncommitted":
            # Once more, for each: an attempt that began meanwhile writes folders of its own, and
            # yet a commit of its own is the one thing that cannot be made good.
            if _living(store, run, assume_dead=assume_dead):
                break
            store.delete(info.key for info in store.list(folder.prefix))
    sweep_run(store, run, older_than_s=older_than_s)
    return found


def _living(store: ObjectStore, run: str, *, assume_dead: bool) -> str:
    theirs = attempt_that_may_live(store, run)
    if theirs is None:
        return ""
    is_here = theirs["host"] == socket.gethostname()
    if assume_dead and not is_here:
        return ""
    who = f"attempt {theirs['number']}, process {theirs['pid']} on {theirs['host']}"
    return who + ("" if is_here else ", has not ended and cannot be looked for from here")


def _old(record: FolderRecord) -> Leftover:
    version = int(record.prefix.split("/version=")[1][:6].split("/")[0])
    return Leftover(
        prefix=record.prefix,
        version=version,
        kind="retention",
        num_files=len(record.files),
        size_bytes=record.size,
    )


def _retired(store: ObjectStore, run: str, state: RunState) -> list[FolderRecord]:
    """What retention would delete of a run that nobody works on, by the settings of its newest
    attempt. Where they leave a choice, more is kept.
    """
    newest, layout = state.trained_episodes, RunLayout(run)
    record = read_json(store, layout.run_json)
    changed = (
        read_json(store, layout.attempt(state.attempts[-1]))["changed"] if state.attempts else {}
    )
    settings = record["config"]["runtime"] | {
        name.removeprefix("runtime."): value
        for name, value in changed.items()
        if name.startswith("runtime.")
    }
    commits = {v: read_json(store, layout.trained(v - 1)) for v in range(1, newest + 1)}
    evaluated = {v for (v, _), found in state.evaluations.items() if found.done}
    has_evaluator = "evaluator" in record["config"]["flows"]
    policy = Retention(
        keep_last=settings["keep_last"],
        newest=newest,
        named=_named(settings, record["config"]["models"], newest),
        needed={v for v in commits if has_evaluator and _is_due(settings, v)} - evaluated,
        kept=milestones(settings["keep_every"], newest)
        | _best(store, run, state, settings, commits, has_evaluator),
    )
    old: list[FolderRecord] = []
    for version in range(newest, 0, -1):
        folders = list(committed_folders(commits[version]))
        old += policy.old(
            version,
            states=[f.record for f in folders if f.kind == "state"],
            weights=[f.record for f in folders if f.kind == "weights"],
        )
    return [folder for folder in reversed(old) if folder.prefix not in state.deleted]


def _named(settings: Mapping[str, Any], models: Mapping[str, Any], newest: int) -> int:
    """The oldest version that a plan to come may name, whichever module is synced how often."""
    said = [model["sync_frequency"] for model in models.values()]
    every = [settings["sync_frequency"], *(n for n in said if n)]
    lagging = max(0, newest - settings["max_staleness"])
    named: int = min(lagging - lagging % n for n in every)
    return named


def _is_due(settings: Mapping[str, Any], version: int) -> bool:
    every = settings["eval_episode_interval"]
    return version == settings["num_episode"] or bool(every and version % every == 0)


def _best(
    store: ObjectStore,
    run: str,
    state: RunState,
    settings: Mapping[str, Any],
    commits: Mapping[int, Mapping[str, Any]],
    has_evaluator: bool,
) -> set[int]:
    measured: dict[int, Mapping[str, float]] = {
        version: commit["metrics"] for version, commit in commits.items() if not has_evaluator
    }
    for (version, digest), found in state.evaluations.items():
        if has_evaluator and found.done and version:
            done = read_json(store, RunLayout(run).evaluation_done(version, digest))
            measured[version] = done["metrics"]
    left = {v: m for v, m in measured.items() if not _is_gone(run, v, state)}
    return best_versions(
        left,
        settings["keep_best"],
        metric=settings["keep_best_metric"],
        highest=settings["keep_best_is"] == "highest",
    )


def _is_gone(run: str, version: int, state: RunState) -> bool:
    return any(RunLayout(run).version_of_weights(prefix) == version for prefix in state.deleted)
