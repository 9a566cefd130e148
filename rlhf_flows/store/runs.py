"""A run and its configuration: `run.json`, written once by whoever starts the run first.

The decision here: one name belongs to one configuration. Fields that may change on resume are
named by the caller, and what changed goes into the record of the attempt, never into `run.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rlhf_flows.errors import ConfigError, RunConflictError
from rlhf_flows.store.commit import commit_json
from rlhf_flows.store.layout import RunLayout
from rlhf_flows.store.objects import ObjectStore

__all__ = ["RunRecord", "config_digest", "open_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run, as `run.json` has it."""

    name: str
    config: dict[str, Any]
    """As first asked."""
    digest: str
    """Of `config`."""
    created_at: str
    """UTC, ISO 8601."""
    is_new: bool
    """Whether this call created the run."""
    changed: dict[str, Any]
    """Fields that now differ from `config`, each as this call asked for it; dotted names."""


def open_run(
    store: ObjectStore,
    name: str,
    *,
    config: dict[str, Any],
    may_change: frozenset[str],
    given: dict[str, Any] | None = None,
) -> RunRecord:
    """Create the run, or join it if it exists with this configuration.

    Args:
        may_change: Dotted names (`rollout.num_replicas`), each with all that is below it.
        given: The part of `config` that is not at its defaults; all of it if None. A field that the
            run does not know and that is at its default came with a later version of this package,
            and is no difference.

    Raises:
        RunConflictError: lists every other difference.
    """
    layout = RunLayout(name)
    asked = _as_json(config)
    record = {
        "run": name,
        "config": asked,
        "digest": config_digest(asked),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    commit = commit_json(store, layout.run_json, record)
    first = dict(_leaves(commit.payload["config"]))
    now = dict(_leaves(asked))
    differing = [
        field
        for field in sorted(first.keys() | now.keys())
        if (field in first, first.get(field)) != (field in now, now.get(field))
    ]
    said = now if given is None else dict(_leaves(_as_json(given)))
    differing = [field for field in differing if field in first or field in said]
    conflicts = [field for field in differing if not _is_free(field, may_change)]
    if conflicts:
        difference = "; ".join(
            f"{field}: {_shown(first, field)} then, {_shown(now, field)} now" for field in conflicts
        )
        raise RunConflictError(
            f"run {name!r} at {store.url} was started with another configuration ({difference}): "
            "give this one another run_name, or ask for the same fields again to resume"
        )
    return RunRecord(
        name=name,
        config=commit.payload["config"],
        digest=commit.payload["digest"],
        created_at=commit.payload["created_at"],
        is_new=commit.mine,
        changed={field: now.get(field) for field in differing},
    )


def config_digest(config: dict[str, Any]) -> str:
    """The same for equal configurations, whatever the order of their fields."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as it will be read back (tuples become lists, keys become strings)."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration cannot be kept as JSON ({error}): use numbers, strings, lists and "
            "dicts, and null instead of NaN or infinity"
        ) from error
    return plain


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; a list is one value, and so is an empty dict."""
    if isinstance(value, dict) and (value or not name):
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _is_free(field: str, may_change: frozenset[str]) -> bool:
    parts = field.split(".")
    return any(".".join(parts[:count]) in may_change for count in range(1, len(parts) + 1))


def _shown(fields: dict[str, Any], field: str) -> str:
    return json.dumps(fields[field]) if field in fields else "(absent)"
