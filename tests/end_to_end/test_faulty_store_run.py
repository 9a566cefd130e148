"""A run whose store fails now and then, and is away for a while, ends as one on a healthy store."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_flows.store import open_store
from tests.end_to_end.processes import start_victim, watched
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    learn,
    toy_engine,
    weight_digests,
)
from tests.faulty_proxy import PASSING, FaultyProxy, faulty_proxy

RUNTIME = {"num_episode": 2}
OUTAGE_S = 20.0


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Of a short name: Ray's sockets are in the folder."""
    with (
        faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_logs,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("RAY_TMPDIR", ray_logs)
        yield proxy


@pytest.mark.slow  # an outage of twenty seconds is part of it
def test_a_run_through_faults_and_an_outage_has_the_bits_of_one_without(
    prefect_server: str, bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    # Workers and flow are cut off alike, in the middle of an episode's rollout.
    proxy.spoil("outage", method="PUT", path="episode=000001/rollout", times=1, seconds=OUTAGE_S)
    proxy.spoil(*PASSING, share=0.05)
    url, log = f"s3://{bucket}/faulty", tmp_path / "calls"
    started = time.monotonic()
    process = start_victim(
        url, "faulty", log, die="never", address=None, first=[(tmp_path, "healthy")], **RUNTIME
    )
    for other in watched(process, timeout_s=150):
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    said = log.with_suffix(".log").read_text()
    assert process.returncode == 0, said[-3000:]
    assert time.monotonic() - started > OUTAGE_S
    met = proxy.faults()
    assert met["outage"] == 1
    assert met["away"] > 2
    assert sum(met[fault] for fault in PASSING) > 5, met

    proxy.rules.clear()
    store = open_store(url)
    for info in store.list("faulty"):
        (tmp_path / info.key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / info.key).write_bytes(store.get(info.key))
    assert weight_digests(tmp_path, "faulty") == weight_digests(tmp_path, "healthy")
    assert_same_bits(tmp_path, "faulty", reference="healthy")
    assert_exactly_once(tmp_path, "faulty", episodes=2)
    assert [p.name for p in sorted((tmp_path / "faulty/attempts").iterdir())] == [
        "000001.ended.json",
        "000001.json",
    ]


def test_an_attempt_sweeps_what_those_before_it_left(services: str, tmp_path: Path) -> None:
    learn(toy_engine(), tmp_path, "run", address=services, num_episode=1)
    lost = tmp_path / "run/weights/version=000001/trainer-lost/model.safetensors"
    lost.parent.mkdir()
    lost.write_bytes(b"of an attempt that was killed before its commit")
    hours_ago_s = time.time() - 7200
    os.utime(lost, (hours_ago_s, hours_ago_s))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    learn(toy_engine(), tmp_path, "run", address=services, num_episode=1)
    deadline = time.monotonic() + 20
    while lost.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert before - {path for path in tmp_path.rglob("*") if path.is_file()} == {lost}
