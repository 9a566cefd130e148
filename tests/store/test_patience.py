"""A store is waited for, within a budget that belongs to the outage."""

from __future__ import annotations

import contextlib

import pytest

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from rlhf_flows.store import Patience


class Clock:
    """Stands in for the module `time`; sleeping moves it on."""

    now_s = 1000.0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("rlhf_flows.store.patience.time", clock)
    return clock


class Server:
    """Away until some instant; each request costs some time."""

    def __init__(self, clock, *, back_s=float("inf"), cost_s=0.0):
        self.clock, self.back_s, self.cost_s = clock, back_s, cost_s
        self.num_requests = 0

    def __call__(self):
        self.num_requests += 1
        self.clock.now_s += self.cost_s
        if self.clock.now_s < self.back_s:
            raise StoreUnavailableError("cannot read s3://b/k: no answer from http://s3")
        return "bytes"


def test_an_outage_within_the_budget_is_only_waited_for(clock, caplog):
    server = Server(clock, back_s=1060)
    assert Patience(120).keep_trying(server) == "bytes"
    assert 1060 <= clock.now_s <= 1070
    assert server.num_requests < 20
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("waiting for the store, 11")
    assert "s3://b/k" in first
    assert last.startswith("the store answers again, after 6")
    assert len(caplog.records) < 10


def test_a_longer_one_ends_with_the_budget_and_says_what_was_tried(clock):
    server = Server(clock)
    with pytest.raises(StoreUnavailableError) as failure:
        Patience(120).keep_trying(server)
    assert clock.now_s == pytest.approx(1120)
    message = str(failure.value)
    assert "\n" not in message
    assert message.startswith(
        "cannot read s3://b/k: no answer from http://s3. Given up after 120 s"
    )
    assert f"{server.num_requests} tries" in message
    assert "store.retry_budget_s" in message


def test_requests_that_hang_count_into_the_budget(clock):
    with pytest.raises(StoreUnavailableError):
        Patience(120).keep_trying(Server(clock, cost_s=30))
    assert clock.now_s <= 1000 + 120 + 30


def test_what_is_asked_after_the_budget_has_one_try(clock):
    patience, server = Patience(120), Server(clock)
    with pytest.raises(StoreUnavailableError):
        patience.keep_trying(server)
    clock.now_s += 1  # a task's retry
    before, server.num_requests = clock.now_s, 0
    with pytest.raises(StoreUnavailableError, match=r"after 121 s without success and 1 try "):
        patience.keep_trying(server)
    assert (clock.now_s, server.num_requests) == (before, 1)


def test_an_answer_of_any_kind_begins_a_new_budget(clock):
    patience = Patience(120)
    for answer in (lambda: None, lambda: _raise(ObjectNotFoundError("no such object"))):
        with pytest.raises(StoreUnavailableError):
            patience.keep_trying(Server(clock))
        with contextlib.suppress(ObjectNotFoundError):
            patience.keep_trying(answer)
        assert patience.keep_trying(Server(clock, back_s=clock.now_s + 60)) == "bytes"


def _raise(error):
    raise error


def test_an_outage_of_long_ago_costs_a_new_one_nothing(clock):
    patience = Patience(120)
    with pytest.raises(StoreUnavailableError):
        patience.keep_trying(Server(clock))
    clock.now_s += 600
    assert patience.keep_trying(Server(clock, back_s=clock.now_s + 60)) == "bytes"


def test_an_object_that_alone_cannot_be_had_has_a_budget_of_its_own(clock):
    patience = Patience(120)
    broken = Server(clock)

    def request():
        patience.keep_trying(lambda: "others are served")
        return broken()

    with pytest.raises(StoreUnavailableError):
        patience.keep_trying(request)
    assert clock.now_s == pytest.approx(1120)


def test_other_errors_are_told_at_once(clock):
    with pytest.raises(StoreError, match="403"):
        Patience(120).keep_trying(lambda: _raise(StoreError("403")))
    assert clock.now_s == 1000


def test_a_patience_that_was_exhausted_waits_no_more(clock):
    patience = Patience(120)
    patience.exhaust()
    server = Server(clock)
    with pytest.raises(StoreUnavailableError):
        patience.keep_trying(server)
    assert server.num_requests == 1
