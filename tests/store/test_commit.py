"""A commit is sure of what it did, whatever answer it got."""

from __future__ import annotations

import json

import pytest

from rlhf_flows.errors import StoreDamageError, StoreError, StoreUnavailableError
from rlhf_flows.store import Commit, Patience, commit_bytes, commit_json, read_json


class Flaky:
    """A store whose puts follow a script; each entry says what one put does."""

    def __init__(self, store, script):
        self.store, self.url, self.script = store, store.url, list(script)
        self.patience = Patience(0.2)

    def get(self, key):
        return self.store.get(key)

    def put_if_absent(self, key, data):
        return self.patience.keep_trying(lambda: self.put_once(key, data))

    def put_once(self, key, data):
        match self.script.pop(0) if self.script else "works":
            case "works":
                return self.store.put_if_absent(key, data)
            case "lost reply":
                self.store.put_if_absent(key, data)
                raise StoreUnavailableError("the reply was lost")
            case "lost reply, retried by the client":
                self.store.put_if_absent(key, data)
                return self.store.put_if_absent(key, data)
            case "unavailable":
                raise StoreUnavailableError("503")
            case "refused":
                raise StoreError("403")
            case other:
                raise AssertionError(other)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("rlhf_flows.store.patience._LONGEST_PAUSE_S", 0.01)


def test_the_first_commit_is_mine_and_the_second_adopts_it(store):
    first = commit_json(store, "trained.json", {"rows": 3})
    second = commit_json(store, "trained.json", {"rows": 3})
    assert first.mine
    assert not second.mine
    assert second.payload == first.payload == read_json(store, "trained.json")
    assert first.payload["rows"] == 3


@pytest.mark.parametrize("trouble", ["lost reply", "lost reply, retried by the client"])
def test_a_lost_reply_is_read_back_and_recognised_by_its_nonce(local_store, trouble):
    commit = commit_json(Flaky(local_store, [trouble]), "k", {"a": 1})
    assert commit == Commit(mine=True, payload=read_json(local_store, "k"))


@pytest.mark.parametrize("trouble", ["lost reply", "lost reply, retried by the client"])
def test_a_lost_reply_does_not_make_another_s_commit_mine(local_store, trouble):
    winner = commit_json(local_store, "k", {"a": 1})
    commit = commit_json(Flaky(local_store, [trouble]), "k", {"a": 1})
    assert commit == Commit(mine=False, payload=winner.payload)


def test_a_store_that_is_away_for_a_moment_is_tried_again(local_store):
    flaky = Flaky(local_store, ["unavailable", "unavailable", "lost reply"])
    assert commit_json(flaky, "k", {}).mine


def test_a_store_that_stays_away_ends_in_an_error_that_may_pass(local_store):
    with pytest.raises(StoreUnavailableError):
        commit_json(Flaky(local_store, ["unavailable"] * 1000), "k", {})


def test_a_refusal_is_not_tried_again(local_store):
    flaky = Flaky(local_store, ["refused"])
    with pytest.raises(StoreError, match="403"):
        commit_json(flaky, "k", {})
    assert local_store.list() == []


def test_an_s3_reply_that_is_lost_for_good_is_recognised_as_mine(s3_store, s3_fault):
    s3_fault("loses_reply", times=1)
    commit = commit_json(s3_store, "k", {"a": 1})
    assert commit.mine
    assert commit.payload == read_json(s3_store, "k")


def test_an_s3_conflict_of_writes_in_flight_is_tried_again(s3_store, s3_fault):
    s3_fault("conflicts", times=1)
    assert commit_json(s3_store, "k", {}).mine


def test_bytes_that_are_their_own_commit_count_when_they_are_the_same(local_store):
    assert commit_bytes(Flaky(local_store, ["lost reply"]), "shard", b"rows")
    assert commit_bytes(local_store, "shard", b"rows"), "a twin with equal bytes loses nothing"
    assert not commit_bytes(local_store, "shard", b"other rows")
    assert local_store.get("shard") == b"rows"


def test_what_is_not_json_cannot_be_committed_and_is_named_when_read(local_store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        commit_json(local_store, "k", {"loss": float("nan")})
    for key, data in (("torn", b'{"a"'), ("list", json.dumps([1]).encode()), ("bytes", b"\xff")):
        local_store.put_if_absent(key, data)
        with pytest.raises(StoreDamageError, match=f"{key} "):
            read_json(local_store, key)
