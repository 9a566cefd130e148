"""Lineage: on a real server, samples, the versions trained on them and exports name each other."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.assets import Asset

from rlhf_flows.exports import export_model
from rlhf_flows.reporting.assets import Lineage, episode_asset, version_asset
from rlhf_flows.services.prefect_server import end_events
from tests.end_to_end.whole_run import learn, toy_engine
from tests.reporting.test_artifacts import a_runtime

MADE = "prefect.asset.materialization.succeeded"


def events_of(url: str, assets: list[Asset]) -> list[dict[str, Any]]:
    """The events of assets, once all of them are there: they come in the background."""
    keys = [asset.key for asset in assets]
    wanted = {"filter": {"event": {"name": [MADE]}, "resource": {"id": keys}}, "limit": 50}
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found: list[dict[str, Any]] = httpx.post(f"{url}/events/filter", json=wanted).json()[
            "events"
        ]
        if {e["resource"]["prefect.resource.id"] for e in found} == set(keys):
            return found
        time.sleep(0.2)
    raise AssertionError(f"the server has {len(found)} events of {keys}")


def upstream(event: dict[str, Any]) -> set[str]:
    return {
        r["prefect.resource.id"] for r in event["related"] if r["prefect.resource.role"] == "asset"
    }


@pytest.mark.slow
def test_a_run_tells_what_was_made_from_what(
    services: str, prefect_server: str, tmp_path: Path
) -> None:
    end_events(timeout_s=0)  # of a server that another test had in this process
    result = learn(toy_engine(), tmp_path, "lineage")
    url = f"file://{tmp_path}"
    last = result.version
    samples, weights = episode_asset(url, "lineage", last - 1), version_asset(url, "lineage", last)
    export_model(url, "lineage", tmp_path / "my model")
    export = Asset(key=f"file://{tmp_path}/my_20model")
    found = {
        e["resource"]["prefect.resource.id"]: e
        for e in events_of(prefect_server, [samples, weights, export])
    }
    before = version_asset(url, "lineage", last - 1).key
    assert upstream(found[samples.key]) == {before}
    assert upstream(found[weights.key]) == {before, samples.key}
    assert upstream(found[export.key]) == {weights.key}
    assert found[weights.key]["payload"]["metrics"]["reward"] > 0
    flow_runs = {r["prefect.resource.id"] for r in found[weights.key]["related"]}
    assert f"prefect.flow-run.{result.flow_run_id}" in flow_runs


def test_an_address_that_is_no_key_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lineage = Lineage(a_runtime(tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200)))
    caplog.set_level(logging.WARNING, logger="rlhf_flows")
    for episode in range(2):
        lineage.finished("training", episode, 1.0, {"loss": 1.0})
    assert lineage.emitted == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("rlhf_flows")]
    assert "Prefect has no assets of run a-run" in warning
    assert "512" in warning


def test_keys_of_any_store_are_such_as_prefect_takes() -> None:
    for url in ("s3://bucket/some where", "file:///home/x/50%/#1/a&b", "file:///home/ü"):
        assert Asset(key=version_asset(url, "run", 3).key).key.endswith(
            "run/weights/version=000003"
        )
