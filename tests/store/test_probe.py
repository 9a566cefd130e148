"""A store that does not keep put-if-absent is refused, by a race."""

from __future__ import annotations

import os
import threading
import time

import pytest

from rlhf_flows.errors import ObjectNotFoundError, StoreProbeError, UserError
from rlhf_flows.store import open_store, probe_put_if_absent
from tests.faulty_proxy import PASSING, faulty_proxy


class MemoryStore:
    """A dict as a store, broken in one way. Copies share the dict, as clients share a server."""

    url = "memory://"

    def __init__(self, fault):
        self.fault, self.objects, self.lock = fault, {}, threading.Lock()

    def put_if_absent(self, key, data):
        if self.fault == "ignores":
            self.objects[key] = data
            return True
        if self.fault == "hasty":
            if key in self.objects:
                return False
            time.sleep(0.002)
            self.objects[key] = data
            return True
        with self.lock:
            if self.fault == "lets two win":
                self.objects.setdefault(key, []).append(data)
                return len(self.objects[key]) <= 2
            absent = key not in self.objects
            if absent or self.fault == "overwrites":
                self.objects[key] = data
        return absent

    def get(self, key):
        try:
            held = self.objects[key]
        except KeyError as error:
            raise ObjectNotFoundError(key) from error
        return held[1] if self.fault == "lets two win" else held

    def delete(self, keys):
        for key in keys:
            self.objects.pop(key, None)


def test_a_sound_store_passes_and_is_left_clean(store):
    probe_put_if_absent(store)
    assert store.list() == []
    probe_put_if_absent(MemoryStore(None))


@pytest.mark.parametrize("fault", ["ignores", "hasty", "overwrites", "lets two win"])
def test_a_broken_store_is_refused_with_the_reason_and_the_setting(fault):
    store = MemoryStore(fault)
    with pytest.raises(StoreProbeError) as refusal:
        probe_put_if_absent(store)
    message = str(refusal.value)
    assert "writers of one object were told they won" in message or "one winner wrote" in message
    assert "store.single_writer=true" in message
    assert isinstance(refusal.value, UserError)
    assert store.objects == {}


@pytest.mark.parametrize("fault", ["ignores_condition", "hasty"])
def test_an_s3_server_that_breaks_the_promise_is_refused(s3_store, s3_fault, fault):
    s3_fault(fault)
    with pytest.raises(StoreProbeError, match=r"of 4 simultaneous writers"):
        probe_put_if_absent(s3_store)


def test_a_hasty_s3_server_would_have_passed_one_call_after_another(s3_store, s3_fault):
    s3_fault("hasty")
    assert s3_store.put_if_absent("k", b"1")
    assert not s3_store.put_if_absent("k", b"2")


def test_a_lost_reply_during_the_probe_accuses_nobody(s3_store, s3_fault):
    s3_fault("loses_reply", times=1)
    probe_put_if_absent(s3_store)


@pytest.mark.parametrize("fault", ["ignores condition", "hasty"])
def test_a_server_behind_a_proxy_that_breaks_the_promise_is_refused(bucket, monkeypatch, fault):
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(f"s3://{bucket}/{fault.replace(' ', '-')}")
        proxy.spoil(fault, method="PUT")
        if fault == "hasty":  # one call after the other would not have found it
            assert store.put_if_absent("k", b"1")
            assert not store.put_if_absent("k", b"2")
        with pytest.raises(StoreProbeError, match=r"of 4 simultaneous.*store\.single_writer=true"):
            probe_put_if_absent(store)


def test_a_sound_server_passes_through_faults(bucket, monkeypatch):
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(f"s3://{bucket}/faults")
        proxy.spoil(*PASSING, share=0.2, seconds=0.05)
        probe_put_if_absent(store)
        assert len(proxy.faults()) > 3
