"""Automations on a Prefect server that start a crashed run again, without a person.

Prefect restarts nothing by itself: a worker reports a crash, and that is all; a flow process that
died together with its worker is not even reported. Three automations, for flow runs with the tag
of this package's deployments only:

- *restart*: a flow run that crashed, and has not moved since, is scheduled again. Not at once: a
  worker reports one crash twice, seconds apart, and the second report would hit the new attempt.
- *heartbeat*: a flow run whose heartbeat stopped has crashed, with its worker or its machine. The
  heartbeat is this package's own (`heartbeat`), which ends where a flow run is suspended.
- *give up*: a flow run that crashes often has failed. A run counts its own dead attempts
  (`runtime.max_attempts`); this one is for processes that die before they can count.

Those that tell a person, or pause a deployment, are in `alert_automations`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from rlhf_flows.services.alert_automations import (
    NOTIFY,
    PAUSE,
    notification_block,
    notifications,
    pauses,
)
from rlhf_flows.services.delays import Alerts, Delays
from rlhf_flows.services.heartbeat import HEARTBEAT, LEFT

__all__ = ["TAG", "automations", "install", "installed", "remove"]

TAG = "rlhf-flows"
"""Of the deployments whose flow runs these automations touch."""
_PREFIX = "rlhf-flows: "

_MOVING = ("AwaitingRetry", "Scheduled", "Late", "Pending", "Submitting", "Running", "Retrying")
_STOPPING = ("Cancelling", "Cancelled", "Suspended", "Paused")
_FINISHED = ("Completed", "Failed", "Crashed", "TimedOut")


def automations(delays: Delays) -> list[AutomationCore]:
    """The three, as Prefect takes them."""

    def trigger(**how: object) -> EventTrigger:
        return EventTrigger.model_validate(
            {
                "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                "match_related": ResourceSpecification(
                    {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
                ),
                "for_each": {"prefect.resource.id"},
                **how,
            }
        )

    restart = AutomationCore(
        name=f"{_PREFIX}restart",
        description="Schedules a crashed run again. It goes on where it was.",
        trigger=trigger(
            posture=Posture.Proactive,
            after=_events("Crashed"),
            expect=_events(*_MOVING, *_STOPPING, "Completed", "Failed"),
            threshold=1,
            within=timedelta(seconds=delays.restart_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="crashed; scheduled again by the automation 'rlhf-flows: restart'",
                force=True,
            )
        ],
    )
    heartbeat = AutomationCore(
        name=f"{_PREFIX}heartbeat",
        description="Reports a run whose process and worker are gone as crashed.",
        trigger=trigger(
            posture=Posture.Proactive,
            after={HEARTBEAT},
            expect={HEARTBEAT, LEFT} | _events(*_STOPPING, *_FINISHED, *_MOVING),
            threshold=1,
            within=timedelta(seconds=delays.heartbeat_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"no heartbeat for {delays.heartbeat_s:g} s",
                force=False,
            )
        ],
    )
    give_up = AutomationCore(
        name=f"{_PREFIX}give up",
        description="Fails a run that crashes again and again; nothing restarts it then.",
        trigger=trigger(
            posture=Posture.Reactive,
            expect=_events("Crashed"),
            threshold=delays.crashes_per_hour,
            within=timedelta(hours=1),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.FAILED,
                name="Failed",
                message=f"crashed {delays.crashes_per_hour} times within an hour, so it is not"
                " started again: look into its logs and those of its worker, then press Retry",
                force=True,
            )
        ],
    )
    return [restart, heartbeat, give_up]


def _events(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def installed(client: SyncPrefectClient) -> list[Automation]:
    """Those of this package that the server has."""
    found = [a for a in client.read_automations() if a.name.startswith(_PREFIX)]
    return sorted(found, key=lambda a: a.name)


def install(client: SyncPrefectClient, delays: Delays, alerts: Alerts | None = None) -> list[str]:
    """Creates the automations, or brings those that are there up to date; their names.

    What is as it should be is left alone: each change makes the server load its triggers anew. So
    are the alerts that `alerts` says nothing of.

    Raises:
        ConfigError: the server has no such notification block.
    """
    alerts = alerts or Alerts()
    wanted = [*automations(delays)]
    if alerts.notify:
        wanted += notifications(_PREFIX, TAG, notification_block(client, alerts.notify))
    if alerts.pause:
        wanted += pauses(_PREFIX, TAG, alerts)
    there = {a.name: a for a in installed(client)}
    for automation in wanted:
        found = there.pop(automation.name, None)
        if found is None:
            client.create_automation(automation)
        elif _essence(found) != _essence(automation):
            client.delete_automation(found.id)
            client.create_automation(automation)
    left = {NOTIFY: alerts.notify is None, PAUSE: alerts.pause is None}
    for unknown in there.values():
        if not left.get(unknown.name.removeprefix(_PREFIX).partition(" ")[0], False):
            client.delete_automation(unknown.id)
    return [a.name for a in wanted]


def _essence(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include=set(AutomationCore.model_fields))


def remove(client: SyncPrefectClient) -> list[str]:
    """Deletes them from the server; the names of those that were there."""
    found = installed(client)
    for automation in found:
        client.delete_automation(automation.id)
    return [a.name for a in found]
