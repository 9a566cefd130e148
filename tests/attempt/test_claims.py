"""A store is opened quickly or not at all, and probed once."""

from __future__ import annotations

import os
import time

import pytest

from rlhf_flows.attempt import open_probed_store
from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import StoreProbeError, StoreUnavailableError
from tests.faulty_proxy import FaultyProxy, faulty_proxy


@pytest.fixture
def proxy(bucket, monkeypatch):
    monkeypatch.setattr("rlhf_flows.store.probe._NUM_KEYS", 4)  # how many is not the point here
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def probes(proxy: FaultyProxy) -> int:
    return len({seen.path.rpartition("-")[0] for seen in proxy.seen if "/.probe/" in seen.path})


def test_a_process_probes_a_store_once(bucket, proxy):
    config = EngineConfig(store={"url": f"s3://{bucket}/once"})
    for _ in range(3):
        assert open_probed_store(config).url == f"s3://{bucket}/once"
        assert probes(proxy) == 1
    open_probed_store(EngineConfig(store={"url": f"s3://{bucket}/other"}))
    assert probes(proxy) == 2


def test_a_store_that_failed_the_probe_is_probed_again(bucket, proxy):
    config = EngineConfig(store={"url": f"s3://{bucket}/broken"})
    proxy.spoil("ignores condition", method="PUT")
    for number in range(2):
        with pytest.raises(StoreProbeError):
            open_probed_store(config)
        assert probes(proxy) == number + 1


def test_the_same_url_at_another_server_is_another_store(bucket, proxy, monkeypatch):
    config = EngineConfig(store={"url": f"s3://{bucket}/moved"})
    open_probed_store(config)
    with faulty_proxy(proxy.upstream) as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
        open_probed_store(config)
        assert probes(other) == 1


def test_the_budget_of_the_configuration_holds_from_the_first_answer_on(bucket, proxy, monkeypatch):
    monkeypatch.setattr("rlhf_flows.attempt.claims.BRIEF_S", 0.5)
    config = EngineConfig(store={"url": f"s3://{bucket}/brief", "retry_budget_s": 77})
    assert open_probed_store(config).patience.budget_s == 77
    proxy.go_away()
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="is it up, and is AWS_ENDPOINT_URL right"):
        open_probed_store(config)
    assert time.monotonic() - started < 8
