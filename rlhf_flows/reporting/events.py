"""Events of a run on the Prefect server: its phases, and what went wrong on the way.

The decision here: an event concerns the run, which outlives its flow runs, and is related to the
flow run that a person or an automation stops and starts, with its tags and deployment, so that
automations match it as they match what Prefect itself emits. Prefect's own sender of events carries
them, in a thread of its own: nobody waits, and what does not arrive is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.events.related import tags_as_related_resources
from prefect.events.schemas.events import RelatedResource

from rlhf_flows.services.event_names import FINISHED, INCIDENT, INCIDENTS, RUN, STARTED
from rlhf_flows.tasks.progress import NoProgress

__all__ = ["RunEvents"]

_MOST_METRICS = 40
_MOST_TEXT = 2000

_OF_EPISODES = ("rollout", "scoring", "training")


class RunEvents(NoProgress):
    """A `Progress` that emits what it is told."""

    def __init__(self, run: str, *, url: str, flow_run: FlowRun) -> None:
        """
        Args:
            url: Of the store that holds the run.
            flow_run: What a person or an automation stops and starts.
        """
        self._run = run
        self._resource = {
            "prefect.resource.id": f"{RUN}{run}",
            "prefect.resource.name": run,
            "rlhf-flows.store": url,
        }
        self._related = _related(flow_run)

    def started(self, phase: str, number: int, total: int) -> None:
        self._emit(STARTED, {"phase": phase, _counted(phase): number})

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        payload = {
            "phase": phase,
            _counted(phase): number,
            "seconds": round(seconds, 3),
            "metrics": dict(list(finite.items())[:_MOST_METRICS]),
        }
        self._emit(FINISHED, payload)

    def incident(self, kind: str, what: str, facts: Mapping[str, Any]) -> None:
        assert kind in INCIDENTS
        self._emit(f"{INCIDENT}{kind}", {"what": what[:_MOST_TEXT], **facts})

    def _emit(self, event: str, payload: Mapping[str, Any]) -> None:
        emit_event(
            event,
            resource=self._resource,
            related=list(self._related),
            payload={"run": self._run, **payload},
        )


def _counted(phase: str) -> str:
    return "episode" if phase in _OF_EPISODES else "version"


def _related(flow_run: FlowRun) -> list[RelatedResource]:
    """The flow run, its deployment if it has one, and its tags."""
    found = [
        {
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": flow_run.name or "",
        }
    ]
    if flow_run.deployment_id is not None:
        found.append(
            {
                "prefect.resource.id": f"prefect.deployment.{flow_run.deployment_id}",
                "prefect.resource.role": "deployment",
            }
        )
    resources = [RelatedResource.model_validate(resource) for resource in found]
    return [*resources, *tags_as_related_resources(flow_run.tags or ())]
