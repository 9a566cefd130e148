"""Lineage as Prefect assets: the samples of an episode, the version trained on them, its export.

The decision here: the events of `@materialize` without its decorator, which wants the assets known
when a task is defined. A run emits two materializations an episode; nothing waits for them, and one
that cannot be sent is a warning.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.events import emit_event
from prefect.exceptions import EventTooLarge

from rlhf_flows.tasks import NoProgress, Runtime

__all__ = ["Lineage", "episode_asset", "export_made", "version_asset"]

logger = logging.getLogger(__name__)

_BY = "rlhf-flows"
_REFUSED = re.compile(r"""[^A-Za-z0-9._:/=@+~,;()!$*-]""")
"""What Prefect refuses in a key, and what is no part of an address without escapes."""


def episode_asset(url: str, run: str, episode: int) -> Asset:
    """The Parquet files of an episode. Raises ValueError where the address makes no key."""
    return _asset(
        f"{url}/{run}/episodes/episode={episode:06d}",
        name=f"{run}: samples of episode {episode + 1}",
        what="Prompts, completions and rewards, as Parquet",
    )


def version_asset(url: str, run: str, version: int) -> Asset:
    """The weights of a policy version. Raises ValueError where the address makes no key."""
    return _asset(
        f"{url}/{run}/weights/version={version:06d}",
        name=f"{run}: version {version}",
        what="Weights, as a Hugging Face folder",
    )


def export_made(url: str, run: str, version: int, folder: Path) -> None:
    """Tells Prefect that the weights of a version were copied to a folder.

    Inside a flow or a task the event names it; outside it goes to the server that is configured.
    """
    try:
        source = version_asset(url, run, version)
        copy = _asset(
            folder.absolute().as_uri(),
            name=f"{run}: export of version {version}",
            what="A copy of the weights, as a Hugging Face folder",
        )
        _materialized(copy, [source], {"run": run, "version": version})
    except (ValueError, EventTooLarge) as e:
        logger.warning("no asset tells of the export to %s: %s", folder, e)


class Lineage(NoProgress):
    """Told by the phases of one run; emits an asset's events as its files are committed."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._url, self._run = runtime.store.url, runtime.run
        self._is_silent = False
        self.emitted = 0
        """Events so far."""

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        runtime = self._runtime
        sampled_last = "scoring" if runtime.scoring_nodes else "rollout"
        if self._is_silent or phase not in ("training", sampled_last):
            return
        try:
            if phase == "training":
                self._version(number + 1, seconds, metrics)
            else:
                self._episode(number, seconds, metrics)
        except (ValueError, EventTooLarge) as e:
            self._is_silent = True
            logger.warning("Prefect has no assets of run %s: %s", self._run, e)

    def _episode(self, episode: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """What was sampled, from the versions that sampled it."""
        versions = sorted(set(self._runtime.sampling_versions(episode).values()) - {0})
        asset = episode_asset(self._url, self._run, episode)
        upstream = [version_asset(self._url, self._run, v) for v in versions]
        told = {"run": self._run, "episode": episode, "seconds": seconds}
        self.emitted += _materialized(asset, upstream, {**told, "metrics": _finite(metrics)})

    def _version(self, version: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """What was trained, from the version before and the samples, where there are any."""
        upstream = []
        if version > 1:
            upstream.append(version_asset(self._url, self._run, version - 1))
        if self._runtime.environment is not None:
            upstream.append(episode_asset(self._url, self._run, version - 1))
        told = {"run": self._run, "version": version, "seconds": seconds}
        asset = version_asset(self._url, self._run, version)
        self.emitted += _materialized(asset, upstream, {**told, "metrics": _finite(metrics)})


def _asset(address: str, *, name: str, what: str) -> Asset:
    return Asset(
        key=_REFUSED.sub("_", address), properties=AssetProperties(name=name, description=what)
    )


def _materialized(asset: Asset, upstream: Sequence[Asset], payload: Mapping[str, Any]) -> int:
    """Emits what `@materialize` would; returns how many events that were."""
    for source in upstream:
        emit_event("prefect.asset.referenced", resource=AssetContext.asset_as_resource(source))
    emit_event(
        "prefect.asset.materialization.succeeded",
        resource=AssetContext.asset_as_resource(asset),
        related=[
            *(AssetContext.asset_as_related(source) for source in upstream),
            AssetContext.related_materialized_by(_BY),
        ],
        payload=dict(payload),
    )
    return len(upstream) + 1


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """An event is JSON, which has no NaN."""
    return {name: x for name, x in metrics.items() if math.isfinite(x)}
