"""What deployments lean on, beside pool and queues: the types of the blocks, and the automations.

Each function compares with the server, and changes nothing yet.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound

from rlhf_flows.blocks import EpisodeStore, RayCluster, RunDefaults
from rlhf_flows.errors import ConfigError
from rlhf_flows.services.automations import automations, install, installed
from rlhf_flows.services.changes import Change, Outcome
from rlhf_flows.services.delays import Delays

__all__ = ["BLOCKS", "automation_changes", "block_changes"]

BLOCKS: tuple[type[Block], ...] = (RayCluster, EpisodeStore, RunDefaults)
_SHOWN = ("logo_url", "documentation_url", "description", "code_example")


def block_changes(client: SyncPrefectClient, defaults: str | None) -> Iterator[Change]:
    """Of the types of blocks. Raises ConfigError where there is no block of run defaults called
    `defaults`.
    """
    if defaults is not None:
        try:
            client.read_block_document_by_name(defaults, RunDefaults.get_block_type_slug())
        except ObjectNotFound as e:
            raise ConfigError(
                f"--defaults {defaults!r}: the server has no block 'RLHF Run Defaults' of this"
                " name: make it in the UI under Blocks, or by RunDefaults(...).save(...)"
            ) from e
    for block in BLOCKS:
        outcome = _block_outcome(client, block)
        yield Change(
            kind="block type",
            name=block.get_block_type_name(),
            outcome=outcome,
            do=None if outcome == "unchanged" else block.register_type_and_schema,
        )


def _block_outcome(client: SyncPrefectClient, block: type[Block]) -> Outcome:
    try:
        there = client.read_block_type_by_slug(block.get_block_type_slug())
    except ObjectNotFound:
        return "created"
    here = block._to_block_type()
    if any(_shown(there, name) != _shown(here, name) for name in _SHOWN):
        return "updated"
    try:
        client.read_block_schema_by_checksum(
            block._calculate_schema_checksum(), version=block.get_block_schema_version()
        )
    except ObjectNotFound:
        return "updated"
    return "unchanged"


def _shown(block_type: Any, name: str) -> str:
    return html.unescape(str(getattr(block_type, name) or ""))


def automation_changes(client: SyncPrefectClient) -> list[Change]:
    """Of the automations, with the patience of those that are there."""
    try:
        there = {a.name: a for a in installed(client)}
    except httpx.HTTPStatusError as e:
        raise ConfigError(
            f"the server has no automations ({e.response.status_code}): leave them out by"
            " --no-automations"
        ) from e
    delays = _delays_of(there)
    changes: list[Change] = []
    for automation in automations(delays):
        found = there.pop(automation.name, None)
        is_same = found is not None and _core(found) == _core(automation)
        outcome: Outcome = "created" if found is None else "unchanged" if is_same else "updated"
        changes.append(Change(kind="automation", name=automation.name, outcome=outcome))
    changes += [Change(kind="automation", name=name, outcome="removed") for name in there]
    if any(change.outcome != "unchanged" for change in changes):
        changes[-1] = replace(changes[-1], do=partial(install, client, delays))
    return changes


def _core(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include=set(AutomationCore.model_fields))


def _delays_of(there: dict[str, Automation]) -> Delays:
    """Those that a person installed them with, `rlhf-flows automations install --restart-s 60`."""
    given: dict[str, Any] = {}
    for name, automation in there.items():
        trigger: Any = automation.trigger
        if name.endswith(": restart"):
            given["restart_s"] = trigger.within.total_seconds()
        elif name.endswith(": heartbeat"):
            given["heartbeat_s"] = trigger.within.total_seconds()
        elif name.endswith(": give up"):
            given["crashes_per_hour"] = trigger.threshold
    return Delays(**given)
