"""What the Prefect UI shows of a run: seven artifacts, made once per flow run and then updated.

The decision here: nothing waits for the UI. Phases tell a `RunBoard`; a task of its own looks at it
and sends what changed, and no artifact may take more than half a percent of the time. An API that
does not answer is logged once and never ends a run.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.logging import get_run_logger

from rlhf_flows.errors import FencedError
from rlhf_flows.flow import phases_of
from rlhf_flows.reporting.assets import Lineage
from rlhf_flows.reporting.curves import draw
from rlhf_flows.reporting.flow_picture import draw_flows
from rlhf_flows.reporting.headline import headline
from rlhf_flows.reporting.now import page
from rlhf_flows.reporting.panels import Curve
from rlhf_flows.reporting.run_board import RunBoard
from rlhf_flows.store import read_json
from rlhf_flows.tasks import Progress, Runtime

__all__ = ["ArtifactProgress", "FanOut", "shown"]

logger = logging.getLogger(__name__)

_EVERY_S = 4.0
"""No artifact is updated more often."""
_SHARE = 0.005
"""Of the time that updates of one artifact may take."""
_STORED_EPISODES = 200
"""Of a resumed run, that are read for the table."""
_LAST_UPDATE_S = 10.0

_LOGGED = ("reward", "accuracy", "loss", "kl", "grad_norm", "logprob_gap")
"""Of an episode, in its line among the logs."""


class FanOut:
    """Tells several."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def begin(self, run: str, num_episode: int) -> None:
        for listener in self._listeners:
            listener.begin(run, num_episode)

    def started(self, phase: str, number: int, total: int) -> None:
        for listener in self._listeners:
            listener.started(phase, number, total)

    def advanced(self, phase: str, number: int, done: int) -> None:
        for listener in self._listeners:
            listener.advanced(phase, number, done)

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        for listener in self._listeners:
            listener.finished(phase, number, seconds, metrics)

    def samples(self, episode: int, previews: Sequence[Mapping[str, Any]]) -> None:
        for listener in self._listeners:
            listener.samples(episode, previews)

    def incident(self, kind: str, what: str, facts: Mapping[str, Any]) -> None:
        for listener in self._listeners:
            listener.incident(kind, what, facts)

    def held_out(self, version: int, previews: Sequence[Mapping[str, Any]]) -> None:
        for listener in self._listeners:
            listener.held_out(version, previews)


@contextlib.asynccontextmanager
async def shown(
    runtime: Runtime, *, name: str, flow_run_id: str, also: Progress | None
) -> AsyncIterator[Progress]:
    """Who is told how far an attempt is: its flow run's artifacts and assets, and `also`."""
    artifacts = ArtifactProgress(
        runtime, name=name, phases=phases_of(runtime), flow_run_id=flow_run_id
    )
    async with artifacts:
        yield FanOut(artifacts, Lineage(runtime), *([] if also is None else [also]))


@dataclass(slots=True, kw_only=True)
class _Artifact:
    """One artifact: how it is made, and what is known of the one on the server."""

    key: str
    type: str
    description: str
    data: Callable[[], Any]
    """Its present content; None while there is none."""
    id: UUID | None = None
    sent: Any = None
    due: float = 0.0


class ArtifactProgress(RunBoard):
    """A `Progress` that shows itself in the Prefect UI, within `async with`.

    Leaving the block sends the last state, and waits for that ten seconds at most.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        name: str,
        phases: Mapping[str, Iterable[int]],
        flow_run_id: str,
    ) -> None:
        """
        Args:
            name: Of the engine: what the artifacts' keys begin with, so that two engines in one
                flow run show themselves side by side.
            phases: As for `RunBoard`.
        """
        super().__init__(settings=runtime.config.runtime, phases=phases)
        self._runtime = runtime
        self._name = name
        self._flow_run_id = UUID(flow_run_id)
        prefix = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "engine"
        of_run = f"run {runtime.run} in {runtime.store.url}"

        def artifact(key: str, type: str, what: str, data: Callable[[], Any]) -> _Artifact:
            return _Artifact(
                key=f"{prefix}-{key}", type=type, description=f"{what} of {of_run}", data=data
            )

        self._artifacts = [
            artifact("progress", "progress", "Progress", lambda: round(self.percent, 1)),
            artifact("now", "markdown", "What is done right now", self._now),
            artifact("curves", "markdown", "Curves", self._picture),
            artifact("flows", "markdown", "Flows", partial(_flows, runtime)),
            artifact("episodes", "table", "Episodes", _table(self.episodes)),
            artifact("samples", "table", "Sample completions", _table(self.sample_rows)),
            artifact(
                "side-by-side", "table", "The same prompts over time", _table(self.side_by_side)
            ),
        ]
        self._log = get_run_logger()
        self._drawn_curves: list[Curve] = []
        self._drawn = ""
        self._said = False
        self._closing = asyncio.Event()
        self._publisher: asyncio.Task[None] | None = None
        self.seconds = 0.0
        """Spent on showing, so far."""

    async def __aenter__(self) -> Self:
        self._publisher = asyncio.create_task(self._publish(), name="artifacts")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._publisher is not None
        if isinstance(error, FencedError):
            self._publisher.cancel()  # the artifacts are the newer attempt's by now
        if error is not None:
            self.stopped_by = type(error).__name__
        self._closing.set()
        done, _ = await asyncio.wait([self._publisher], timeout=_LAST_UPDATE_S)
        if not done:
            self._publisher.cancel()
            self._say(f"the last update took more than {_LAST_UPDATE_S:g} s")
        elif not self._publisher.cancelled() and (failure := self._publisher.exception()):
            logger.error(
                "the artifacts of run %s are incomplete", self._runtime.run, exc_info=failure
            )

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        """Besides, one line an episode and an evaluation among the logs of the flow run."""
        super().finished(phase, number, seconds, metrics)
        if phase == "training":
            names = headline(metrics, _LOGGED)
            self._say_metrics(f"{self._name}, episode {number}", seconds, names, metrics)
        elif phase == "evaluation" and seconds:  # none: an earlier attempt did it
            self._say_metrics(
                f"{self._name}, evaluation of version {number}", seconds, list(metrics), metrics
            )

    def _say_metrics(
        self, what: str, seconds: float, names: Sequence[str], metrics: Mapping[str, float]
    ) -> None:
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
        self._log.info("%s: %s (%.1f s)", what, shown, seconds)

    # ---- in the background ----------------------------------------------------------------

    async def _publish(self) -> None:
        seen = -1
        async with get_client() as client:
            await self._guarded(self._find(client))
            await asyncio.to_thread(self._read_stored)
            while not self._closing.is_set():
                if seen != self.changes:
                    seen = self.changes
                    await self._send_all(client)
                try:
                    async with asyncio.timeout(_EVERY_S):
                        await self._closing.wait()
                except TimeoutError:
                    continue
            for artifact in self._artifacts:
                artifact.due = 0.0
            await self._send_all(client)

    async def _find(self, client: PrefectClient) -> None:
        """A retried flow run goes on with the artifacts it has."""
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[self._flow_run_id]))
        found = await client.read_artifacts(artifact_filter=of_this_run)
        there = {(a.key, a.description): a.id for a in found}
        for artifact in self._artifacts:
            artifact.id = there.get((artifact.key, artifact.description))

    def _read_stored(self) -> None:
        runtime = self._runtime
        first = runtime.state.trained_episodes
        if first:
            stored = range(max(0, first - _STORED_EPISODES), first)
            commits = {e: read_json(runtime.store, runtime.layout.trained(e)) for e in stored}
            self.resume(commits, first=first)

    async def _send_all(self, client: PrefectClient) -> None:
        for artifact in self._artifacts:
            if not await self._send(client, artifact):
                return  # whoever is away for one is away for all

    async def _send(self, client: PrefectClient, artifact: _Artifact) -> bool:
        started = time.monotonic()
        data = artifact.data() if started >= artifact.due else None
        if data is None or data == artifact.sent:
            return True
        is_sent = await self._guarded(self._upload(client, artifact, data))
        if is_sent:
            artifact.sent = data
        seconds = time.monotonic() - started
        self.seconds += seconds
        artifact.due = started + max(_EVERY_S, seconds / _SHARE)
        return is_sent

    async def _upload(self, client: PrefectClient, artifact: _Artifact, data: Any) -> None:
        if artifact.id is None:
            made = await client.create_artifact(
                ArtifactCreate(
                    key=artifact.key,
                    type=artifact.type,
                    description=artifact.description,
                    data=data,
                    flow_run_id=self._flow_run_id,
                )
            )
            artifact.id = made.id
            return
        # Not client.update_artifact: it also emits an event that carries the whole content.
        await client.request(
            "PATCH", "/artifacts/{id}", path_params={"id": artifact.id}, json={"data": data}
        )

    async def _guarded(self, call: Coroutine[Any, Any, None]) -> bool:
        try:
            await call
        except httpx.HTTPError as e:
            self._say(f"{type(e).__name__}: {e}")
            return False
        return True

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "the artifacts of run %s may be out of date: %s", self._runtime.run, what
            )

    # ---- contents -------------------------------------------------------------------------

    def _now(self) -> str | None:
        return page(self.now()) if self.changes else None

    def _picture(self) -> str | None:
        curves = self.curves()
        if not any(len(line.points) > 1 for curve in curves for line in curve.lines):
            return None
        if curves != self._drawn_curves:
            self._drawn_curves, self._drawn = curves, _image("curves", draw(curves))
        return self._drawn


def _image(what: str, svg: str) -> str:
    """As a data URI: it is shown where nothing can be fetched, too."""
    return f"![{what}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _flows(runtime: Runtime) -> str | None:
    graphs = {
        name: graph
        for name, graph in (
            ("environment", runtime.environment),
            ("trainer", runtime.trainer),
            ("evaluator", runtime.evaluator),
        )
        if graph is not None
    }
    if not graphs:
        return None
    return _image(
        "flows", draw_flows(graphs, [(pair.source, pair.target) for pair in runtime.syncs])
    )


def _table(rows: Callable[[], Sequence[Mapping[str, Any]]]) -> Callable[[], str | None]:
    return lambda: json.dumps(found) if (found := rows()) else None
