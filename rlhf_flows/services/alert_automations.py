"""Automations that tell a person, and that keep a schedule from starting more of what fails.

Four, for flow runs with the tag of this package's deployments only; each is installed where it is
asked for:

- *notify of failures*: a flow run failed, of itself or because a guard rail stopped it.
- *notify of incidents*: something went wrong in a run that goes on.
- *pause at guard rail*: a guard rail stopped a run: its deployment is paused, with its schedules.
- *pause after failures*: so many flow runs of a deployment failed within a week.

The decision here: an incident that ends the run is told of by the failure that it ends in, so that
one thing is one message.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import ActionTypes, PauseDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from rlhf_flows.errors import ConfigError
from rlhf_flows.services.delays import DELIVERED, Alerts
from rlhf_flows.services.event_names import INCIDENT, INCIDENTS, RUN

__all__ = ["NOTIFY", "PAUSE", "notification_block", "notifications", "pauses"]

NOTIFY = "notify"
"""What the names of the automations that tell a person begin with."""
PAUSE = "pause"
"""The same of those that pause deployments."""

_ENDS_THE_RUN = frozenset({"guard-rail"})
_FAILED = "prefect.flow-run.Failed"
_DEPLOYMENT = "related:deployment:prefect.resource.id"


def notifications(prefix: str, tag: str, block_id: UUID) -> list[AutomationCore]:
    """Those that send by a notification block, at most one message a run and kind of event within
    `DELIVERED`.
    """
    incidents = {f"{INCIDENT}{kind}" for kind in INCIDENTS if kind not in _ENDS_THE_RUN}
    return [
        _automation(
            f"{prefix}{NOTIFY} of failures",
            "Tells that a run failed, and why.",
            _trigger(tag, {_FAILED}, threshold=1, within=timedelta(0)),
            SendNotification(
                block_document_id=block_id,
                subject="rlhf-flows: {{ flow.name }} / {{ flow_run.name }} failed",
                body="{{ flow_run.state.message }}\n\n{{ flow_run|ui_url }}",
            ),
        ),
        _automation(
            f"{prefix}{NOTIFY} of incidents",
            "Tells what went wrong in a run that goes on.",
            _trigger(
                tag,
                incidents,
                threshold=1,
                within=DELIVERED,
                for_each={"prefect.resource.id"},
            ),
            SendNotification(
                block_document_id=block_id,
                subject="rlhf-flows: {{ event.event }} in {{ event.payload.run }}",
                body="{{ event.payload.what }}\n\n{{ flow_run|ui_url }}",
            ),
        ),
    ]


def pauses(prefix: str, tag: str, alerts: Alerts) -> list[AutomationCore]:
    """Those that pause the deployment of a flow run, and its schedules with it."""
    pause = PauseDeployment(source="inferred", deployment_id=None)
    return [
        _automation(
            f"{prefix}{PAUSE} at guard rail",
            "Pauses the deployment of a run that a guard rail stopped.",
            _trigger(tag, {f"{INCIDENT}guard-rail"}, threshold=1, within=timedelta(0)),
            pause,
        ),
        _automation(
            f"{prefix}{PAUSE} after failures",
            f"Pauses a deployment of which {alerts.failures_a_week} runs failed within a week.",
            _trigger(
                tag,
                {_FAILED},
                threshold=alerts.failures_a_week,
                within=timedelta(days=7),
                for_each={_DEPLOYMENT},
            ),
            pause,
        ),
    ]


def notification_block(client: SyncPrefectClient, name: str) -> UUID:
    """The id of a block `type/name`. Raises ConfigError where the server has none of that name."""
    kind, slash, own = name.partition("/")
    if not (slash and kind and own):
        raise ConfigError(
            f"--notify was given {name!r}, expected a block as `prefect block ls` names it, such as"
            " slack-webhook/team"
        )
    try:
        return client.read_block_document_by_name(own, kind, include_secrets=False).id
    except ObjectNotFound as e:
        raise ConfigError(
            f"the server has no block {name!r}: make one in the UI (Blocks, then Slack Webhook,"
            " Microsoft Teams Webhook, Email or another that notifies); `prefect block ls` lists"
            " them"
        ) from e


def _automation(
    name: str, description: str, trigger: EventTrigger, action: ActionTypes
) -> AutomationCore:
    return AutomationCore(name=name, description=description, trigger=trigger, actions=[action])


def _trigger(
    tag: str,
    expect: set[str],
    *,
    threshold: int,
    within: timedelta,
    for_each: set[str] | None = None,
) -> EventTrigger:
    return EventTrigger(
        # By a list, as the server gives it back: a flow run's events, and a run's.
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*", f"{RUN}*"]}),
        match_related=ResourceSpecification(
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
        ),
        expect=expect,
        for_each=for_each or set(),
        posture=Posture.Reactive,
        threshold=threshold,
        within=within,
    )
