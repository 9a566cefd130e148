"""The run in its store: a store that keeps its promise, a name that is free or one's own."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from pydantic import BaseModel

from rlhf_flows.attempt.description import Checked
from rlhf_flows.attempt.names import fill_in, is_template
from rlhf_flows.attempt.parents import Parent, find_parent
from rlhf_flows.config import MAY_CHANGE, EngineConfig
from rlhf_flows.errors import ConfigError, StoreError, StoreUnavailableError
from rlhf_flows.store import (
    ObjectStore,
    RunRecord,
    check_run_name,
    open_run,
    open_store,
    probe_put_if_absent,
)
from rlhf_flows.store.patience import BRIEF_S

__all__ = ["check_store", "claim_run", "open_probed_store"]

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""A URL names another store where one of these differs."""
_probed: set[tuple[str | None, ...]] = set()


def check_store(checked: Checked) -> None:
    """Whether the store can be used, and the run's name is free or of this configuration."""
    name = checked.config.run_name
    if name is not None and not is_template(name):
        claim_run(checked, check_run_name(name))
        return
    if name is not None:
        fill_in(name)  # by what it will be filled in, only the flow run knows
    open_probed_store(checked.config)


def open_probed_store(config: EngineConfig) -> ObjectStore:
    """The store, which holds its promise. Raises ConfigError, StoreProbeError.

    A process probes each store once.
    """
    budget_s = config.store.retry_budget_s
    try:
        # No long wait for the first answer: a wrong address is a more likely reason than an outage.
        store = open_store(config.store.url, retry_budget_s=min(budget_s, BRIEF_S))
    except StoreUnavailableError:
        raise
    except StoreError as e:
        raise ConfigError(f"store.url cannot be used: {e}") from e
    store.patience.budget_s = budget_s
    which = (store.url, *(os.environ.get(name) for name in _ENDPOINTS))
    if not config.store.single_writer and which not in _probed:
        probe_put_if_absent(store)
        _probed.add(which)
    return store


def claim_run(checked: Checked, run: str) -> tuple[ObjectStore, RunRecord]:
    """The store, probed, and the run in it: new, or one of the same configuration.

    Raises RunConflictError for a name of another configuration.
    """
    store = open_probed_store(checked.config)
    parent = find_parent(checked.config)
    return store, open_run(
        store,
        run,
        config=_identity(checked, parent),
        given=_identity(checked, parent, exclude_defaults=True),
        may_change=_may_change(checked),
    )


def _identity(
    checked: Checked, parent: Parent | None, *, exclude_defaults: bool = False
) -> dict[str, Any]:
    """What makes two starts the same run."""
    dump = partial(BaseModel.model_dump, mode="json", exclude_defaults=exclude_defaults)
    return {
        "recipe": checked.description.name,
        **dump(checked.config, exclude={"run_name", "models"}),
        **({} if parent is None else {"parent": parent.to_json()}),
        # Said or not, a module's placement is the same.
        "models": {name: dump(checked.config.for_model(name)) for name in checked.modules},
        "flows": {
            part: [n.call for n in graph.nodes]
            for part, graph in (
                ("environment", checked.environment),
                ("trainer", checked.trainer),
                ("evaluator", checked.evaluator),
            )
            if graph is not None
        },
    }


def _may_change(checked: Checked) -> frozenset[str]:
    names = {"parent.store"}  # it may have moved, with the run
    for field in MAY_CHANGE:
        names |= {field.replace("*", name) for name in checked.modules}
    return frozenset(names)
