"""A child run: its trained modules begin with what another run of the store trained.

The decision here: `init_from=RUN@VERSION` is about weights alone, and each trained module takes
those of its own name. Optimizer, schedule and episodes begin anew, and what is frozen (a reference,
a reward model) stays what the configuration says. So a KL is still held against the first model,
which `model=run:RUN@VERSION` would change for all roles at once. Who the parent was stands in
`run.json`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.exports import exported_model
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.records.finding import find_run, missing_version, open_existing_store
from rlhf_flows.store import RunLayout, read_json
from rlhf_flows.tasks.weights import SyncPair

__all__ = ["Parent", "begin_from_parent", "find_parent", "parse_parent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """Whose weights a run begins with."""

    run: str
    version: int
    store: str
    """Its URL."""
    digests: Mapping[str, str]
    """Of the weights, by the name of the module that trained them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_parent(init_from: str) -> tuple[str, int]:
    """Run and version. Raises ConfigError where it is not RUN@VERSION."""
    found = re.fullmatch(r"([^@/]+)@(\d+)", init_from)
    if found is None:
        raise ConfigError(
            f"init_from={init_from!r} does not name a version of a run: write RUN@VERSION, such as"
            " my-run@4; `rlhf-flows episodes RUN` lists the versions"
        )
    return found[1], int(found[2])


def find_parent(config: EngineConfig) -> Parent | None:
    """The parent that the configuration names. Raises ConfigError where it is not in the store."""
    if config.init_from is None:
        return None
    run, version = parse_parent(config.init_from)
    store = open_existing_store(config.store.url, retry_budget_s=config.store.retry_budget_s)
    newest = find_run(store, run).trained_episodes
    if not 1 <= version <= newest:
        raise missing_version(run, version, newest)
    checkpoints = read_json(store, RunLayout(run).trained(version - 1))["checkpoints"]
    digests = {name: entry["digest"] for name, entry in checkpoints.items()}
    return Parent(run=run, version=version, store=store.url, digests=digests)


def begin_from_parent(
    config: EngineConfig,
    modules: Mapping[str, BaseModule],
    *,
    trained: Collection[str],
    syncs: Sequence[SyncPair],
) -> None:
    """Points the trained modules, and those that follow them, to the parent's weights.

    Raises ConfigError where the parent did not train a module of that name, retention has deleted
    the weights, or a module does not begin with a folder.
    """
    parent = find_parent(config)
    if parent is None:
        return
    if not trained:
        raise ConfigError(
            f"init_from={config.init_from!r} was given to a run that trains nothing: write"
            f" model=run:{config.init_from} to work with that model"
        )
    followers = {pair.target: pair.source for pair in syncs}
    for name in sorted({*trained, *followers}):
        source = followers.get(name, name)
        if source not in parent.digests:
            raise ConfigError(
                f"init_from={config.init_from!r}: run {parent.run!r} trains"
                f" {', '.join(sorted(parent.digests))}, and no {source!r}: a run of another recipe"
                f" begins with its model by model=run:{config.init_from}/MODULE"
            )
        module = modules[name]
        if not hasattr(module, "path"):
            raise ConfigError(
                f"init_from={config.init_from!r}: module {name!r} ({type(module).__name__}) has no"
                " `path` to begin with: keep the Hugging Face folder that setup() loads as"
                " self.path"
            )
        folder = exported_model(
            config.store.url,
            parent.run,
            version=parent.version,
            module=source,
            retry_budget_s=config.store.retry_budget_s,
        )
        setattr(module, "path", folder)  # noqa: B010  of the modules that have one
