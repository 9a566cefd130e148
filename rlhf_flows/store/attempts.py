"""Attempts: numbered executions of a run. The number is the fencing token.

The decision here: each number is taken once, by put-if-absent, and the highest one rules. That two
processes both work is made harmless by the fence, not prevented by a lock: a lock would need a
clock. Only the impatient second start on the same machine, whose first is plainly alive, is
refused.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import psutil

from rlhf_flows.errors import FencedError, RunBusyError, StoreError
from rlhf_flows.store.commit import commit_json, read_json
from rlhf_flows.store.layout import RunLayout, parse_key
from rlhf_flows.store.objects import ObjectStore

__all__ = [
    "Attempt",
    "Outcome",
    "attempt_that_may_live",
    "check_fence",
    "deaths_in_a_row",
    "end_attempt",
    "newest_attempt",
    "take_attempt",
]

Outcome = Literal["completed", "failed", "cancelled", "suspended", "fenced", "terminated"]
"""How an attempt ended that could say so. `terminated`: asked to leave by a signal, by nobody who
cancelled the run (a node that is drained, a worker that is stopped)."""
_DEATHS: tuple[Outcome | None, ...] = ("terminated", None)

logger = logging.getLogger(__name__)

_PACKAGES = ("rlhf-flows", "torch", "ray", "prefect", "vllm")
_START_TOLERANCE_S = 2.0
"""A process's start is reckoned from the boot time, which moves a little as clocks are set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One execution of a run by one flow process."""

    number: int
    flow_run_id: str | None
    host: str
    pid: int
    process_started_s: float
    """Unix time. Tells the process from a later one with the same pid."""
    started_at: str
    """UTC, ISO 8601."""
    versions: dict[str, str | None]
    """Of Python and of what runs; None where it is not installed."""
    changed: dict[str, Any]
    """Fields that differ from `run.json`."""


def take_attempt(
    store: ObjectStore,
    run: str,
    *,
    flow_run_id: str | None,
    changed: dict[str, Any],
    takeover: bool = False,
) -> Attempt:
    """Take the next number, which fences every attempt before.

    Raises `RunBusyError` if the newest attempt has not ended and its process is alive on this
    host (and is not this one), unless `takeover`. An attempt of the same flow run is always
    replaced: Prefect runs that one again only where it was given up.
    """
    layout = RunLayout(run)
    mine = _this_process()
    while True:
        numbers, ended = _listed(store, layout)
        newest = max(numbers, default=0)
        if newest and newest not in ended and not takeover:
            theirs = read_json(store, layout.attempt(newest))
            is_another = flow_run_id is None or theirs["flow_run_id"] != flow_run_id
            if is_another and _is_alive(theirs, mine):
                raise RunBusyError(
                    f"run {run!r} is busy: attempt {newest} is alive as process {theirs['pid']} on"
                    f" {theirs['host']}, since {theirs['started_at']}: wait for it, cancel its flow"
                    " run, or replace it (`rlhf-flows train --takeover`, `learn(takeover=True)`)"
                )
        record = {
            "run": run,
            "number": newest + 1,
            "flow_run_id": flow_run_id,
            "started_at": _now(),
            "versions": _versions(),
            "changed": changed,
            **mine,
        }
        # Not mine: somebody was faster. Look again, as that one may be alive.
        if commit_json(store, layout.attempt(newest + 1), record).mine:
            del record["run"]
            return Attempt(**record)


def end_attempt(store: ObjectStore, run: str, number: int, outcome: Outcome) -> None:
    """Record how the attempt ended, if the store takes it. The first record stands."""
    record = {"number": number, "outcome": outcome, "ended_at": _now()}
    try:
        commit_json(store, RunLayout(run).attempt_ended(number), record)
    except StoreError as error:
        # No run fails for it, nor is the error hidden that the caller may be on its way out with.
        logger.warning("that attempt %d ended (%s) is not recorded: %s", number, outcome, error)


def newest_attempt(store: ObjectStore, run: str) -> int:
    """The highest number taken; 0 if there is none."""
    numbers, _ = _listed(store, RunLayout(run))
    return max(numbers, default=0)


def deaths_in_a_row(store: ObjectStore, run: str) -> list[int]:
    """The newest attempts that died, back to one that ended in good order; the newest first.

    One that was fenced counts neither way: somebody else had the run by then. Nor does the newest
    one where it is plainly alive.
    """
    layout = RunLayout(run)
    numbers, ended = _listed(store, layout)
    newest = max(numbers, default=0)
    if newest and newest not in ended:
        theirs = read_json(store, layout.attempt(newest))
        if _is_alive(theirs, _this_process()):
            numbers.remove(newest)
    deaths = []
    for number in sorted(numbers, reverse=True):
        key = layout.attempt_ended(number)
        outcome = read_json(store, key)["outcome"] if number in ended else None
        if outcome in _DEATHS:
            deaths.append(number)
        elif outcome != "fenced":
            break
    return deaths


def attempt_that_may_live(store: ObjectStore, run: str) -> dict[str, Any] | None:
    """The record of the newest attempt, unless it has ended or its process on this host is gone.

    What runs on another host cannot be seen from here: it may live, with `host` and `pid` to look
    for. Attempts before the newest are fenced.
    """
    layout = RunLayout(run)
    numbers, ended = _listed(store, layout)
    newest = max(numbers, default=0)
    if not newest or newest in ended:
        return None
    theirs = read_json(store, layout.attempt(newest))
    mine = _this_process()
    is_mine = (theirs["host"], theirs["pid"]) == (mine["host"], mine["pid"])
    is_elsewhere = theirs["host"] != mine["host"]
    return theirs if is_elsewhere or is_mine or _is_alive(theirs, mine) else None


def check_fence(store: ObjectStore, run: str, number: int) -> None:
    """Raise `FencedError` when a newer attempt has taken over."""
    newest = newest_attempt(store, run)
    if newest > number:
        raise FencedError(
            f"attempt {number} of run {run!r} was replaced by attempt {newest}: it stops here, "
            "the newer one goes on"
        )


def _listed(store: ObjectStore, layout: RunLayout) -> tuple[set[int], set[int]]:
    """Numbers of the attempts, and of those that have ended; one listing."""
    infos = store.list(layout.attempts_prefix)
    parts = [part for info in infos if (part := parse_key(layout.run, info.key))]
    return (
        {part.number for part in parts if part.kind == "attempt"},
        {part.number for part in parts if part.kind == "attempt_ended"},
    )


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    return {"host": socket.gethostname(), "pid": pid, "process_started_s": started}


def _is_alive(theirs: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the process of an attempt is another one of this machine, and runs."""
    if theirs["host"] != mine["host"] or theirs["pid"] == mine["pid"]:
        return False
    try:
        process = psutil.Process(theirs["pid"])
        started, status = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    is_same = abs(started - theirs["process_started_s"]) <= _START_TOLERANCE_S
    return is_same and status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
