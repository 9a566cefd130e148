"""Runs by name: which a store has, and errors that name the nearest one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_flows.errors import ConfigError
from rlhf_flows.registry import nearest
from rlhf_flows.store import ObjectStore, RunState, check_run_name, open_store, scan
from rlhf_flows.store.patience import BRIEF_S

__all__ = ["find_run", "missing_version", "open_existing_store", "run_names", "shown_numbers"]


def open_existing_store(url: str | Path, *, retry_budget_s: float = BRIEF_S) -> ObjectStore:
    """The store at `url`. Raises ConfigError for a folder that is not there: who looks makes none.

    Raises StoreError for one that does not answer.
    """
    scheme, separator, rest = str(url).partition("://")
    folder = Path(rest if separator else str(url)).expanduser()
    if (not separator or scheme == "file") and not folder.is_dir():
        raise ConfigError(
            f"there is no store in {str(folder)!r}: name the folder or s3://bucket/prefix that"
            " holds the runs (--store)"
        )
    return open_store(url, retry_budget_s=retry_budget_s)


def run_names(store: ObjectStore) -> list[str]:
    """Every run of the store, in order."""
    return sorted(
        {i.key.split("/", 1)[0] for i in store.list() if i.key.count("/") == 1 and _is_run(i.key)}
    )


def _is_run(key: str) -> bool:
    return key.endswith("/run.json")


def find_run(store: ObjectStore, run: str) -> RunState:
    """What exists of the run. Raises ConfigError, with the nearest name, where it is not there."""
    state = scan(store, check_run_name(run))
    if not state.exists:
        raise ConfigError(
            f"there is no run {run!r} in {store.url}{nearest(run, run_names(store))}:"
            " `rlhf-flows runs` lists them"
        )
    return state


def missing_version(run: str, version: int, newest: int) -> ConfigError:
    """That the run has not trained this version, and which it has."""
    return ConfigError(
        f"run {run!r} has no trained version {version}: "
        + (f"it has versions 1 to {newest}" if newest else "nothing is trained yet")
    )


def shown_numbers(numbers: Any) -> str:
    """`0 to 4, 7`: numbers in a sentence."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts) or "none"
