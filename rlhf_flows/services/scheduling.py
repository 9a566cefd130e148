"""Schedules of deployments by cron, one of ours for each; those that a person made are not touched.

Prefect replaces all schedules of a deployment that is created anew, so they are written apart from
it, by their slug.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from pydantic import ValidationError

from rlhf_flows.errors import ConfigError
from rlhf_flows.services.changes import Change

__all__ = ["NO_SCHEDULE", "SLUG", "Schedule", "parse_schedule", "schedule_change"]

SLUG = "rlhf-flows-deploy"
"""Of the schedule that `rlhf-flows deploy` keeps."""
NO_SCHEDULE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When a deployment runs."""

    deployment: str
    """FLOW/NAME."""
    cron: CronSchedule | None
    """None: never."""


def parse_schedule(text: str, *, timezone: str) -> Schedule:
    """`grpo/quickstart=0 3 * * *`, or `grpo/quickstart=none`.

    Raises ConfigError where it is no cron expression, or the timezone is unknown.
    """
    name, equals, cron = (part.strip() for part in text.partition("="))
    if not equals or "/" not in name or not cron:
        raise ConfigError(
            f"--schedule {text!r} is no schedule: write it as FLOW/NAME=CRON, such as"
            " 'grpo/quickstart=0 3 * * *', or FLOW/NAME=none to remove it"
        )
    if cron == NO_SCHEDULE:
        return Schedule(deployment=name, cron=None)
    try:
        return Schedule(deployment=name, cron=CronSchedule(cron=cron, timezone=timezone))
    except ValidationError as e:
        wrong = {str(error["loc"][0]) for error in e.errors() if error["loc"]}
        if "timezone" in wrong:
            raise ConfigError(
                f"--timezone {timezone!r} is unknown: take a name such as UTC or Europe/Berlin"
            ) from e
        raise ConfigError(
            f"--schedule {text!r}: {cron!r} is no cron expression; it has five parts (minute, hour,"
            " day, month, weekday), such as '0 3 * * *' for three o'clock at night"
        ) from e


def schedule_change(
    client: SyncPrefectClient, schedule: Schedule, deployment: DeploymentResponse | None
) -> Change:
    """What becomes of our schedule of the deployment, which may not be there yet."""
    change = partial(Change, kind="schedule", name=schedule.deployment)
    ours = next((s for s in (deployment.schedules if deployment else ()) if s.slug == SLUG), None)
    if schedule.cron is None:
        if ours is None or deployment is None:
            return change(outcome="unchanged", detail="none")
        remove = partial(client.delete_deployment_schedule, deployment.id, ours.id)
        return change(outcome="removed", detail=_said(ours.schedule), do=remove)
    detail = _said(schedule.cron)
    if ours is not None and ours.schedule == schedule.cron:
        return change(outcome="unchanged", detail=detail)
    put = partial(_put, client, schedule, ours)
    return change(outcome="created" if ours is None else "updated", detail=detail, do=put)


def _put(client: SyncPrefectClient, schedule: Schedule, ours: DeploymentSchedule | None) -> None:
    assert schedule.cron is not None
    deployment_id = client.read_deployment_by_name(schedule.deployment).id
    if ours is not None:
        client.update_deployment_schedule(deployment_id, ours.id, schedule=schedule.cron)
        return
    new = DeploymentScheduleCreate(schedule=schedule.cron, active=True, slug=SLUG)
    client.create_deployment_schedules(deployment_id, [new])


def _said(schedule: Any) -> str:
    """A schedule in words, as tables show it."""
    if isinstance(schedule, CronSchedule):
        return f"{schedule.cron} ({schedule.timezone})"
    return type(schedule).__name__
