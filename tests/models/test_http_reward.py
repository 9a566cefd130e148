"""A reward service, and one that is slow, wrong, away or hostile; by a real server in a thread."""

from __future__ import annotations

import logging
import pickle
import socket
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError, RewardError
from rlhf_flows.models.http_reward import HTTPReward
from rlhf_flows.models.http_service import public_url
from tests.models.reward_service import RewardService

TOKEN = "s3cr3t-t0ken"


@pytest.fixture
def service() -> Iterator[RewardService]:
    with RewardService() as running:
        yield running


def batch(*completions: str) -> Batch:
    return {
        "sample_id": [f"e000000-r00000{i}-s00" for i in range(len(completions))],
        "prompt": ["p"] * len(completions),
        "completion": list(completions),
        "answer": [{"of": [i]} for i in range(len(completions))],
        "response_ids": [torch.arange(2) for _ in completions],
    }


def reward(url: str, **options: Any) -> HTTPReward:
    made = HTTPReward(url=url, **{"retries": 0, "timeout_s": 10.0, **options})
    made.validate()
    made.setup()
    return made


def refused(url: str, **options: Any) -> str:
    """The error; whatever it is, it pickles, and says nothing that it should not."""
    with pytest.raises(RewardError) as raised:
        reward(url, **options).forward_step(batch("bad", "good"))
    said = str(pickle.loads(pickle.dumps(raised.value)))
    assert said == str(raised.value)
    assert TOKEN not in said
    for word in (f"reward service {public_url(url)} of module 'reward'", "r000000", "'bad'"):
        assert word in said
    return said


# ---- what it does -----------------------------------------------------------------------------


def test_rows_go_out_in_requests_and_rewards_come_back_in_order(service: RewardService) -> None:
    texts = ["é" * n for n in (3, 1, 2, 0, 5)]
    out = reward(f"{service.url}/lengths", request_size=2).forward_step(batch(*texts))
    assert out["reward"].tolist() == [3, 1, 2, 0, 5]
    assert out["reward"].dtype == torch.float32
    sent = sorted((s for _, _, s in service.requests), key=lambda s: s[0]["sample_id"])
    assert [len(samples) for samples in sent] == [2, 2, 1]
    assert sent[0][1] == {
        "sample_id": "e000000-r000001-s00",
        "prompt": "p",
        "completion": "é",
        "answer": {"of": [1]},
    }
    empty = reward(f"{service.url}/lengths").forward_step(batch())
    assert empty["reward"].shape == (0,)


def test_further_numbers_become_columns(service: RewardService) -> None:
    out = reward(f"{service.url}/parts").forward_step(batch("a", "bb"))
    assert {k: v.tolist() for k, v in out.items()} == {"reward": [1, 1], "length": [1, 2]}


def test_no_more_requests_are_in_flight_than_allowed(service: RewardService) -> None:
    reward(f"{service.url}/slow", request_size=1, max_concurrency=2).forward_step(batch(*"abcdef"))
    assert service.most_in_flight == 2
    assert service.count("/slow") == 6


# ---- what passes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "requests"), [("away_twice", 3), ("closes_once", 2)])
def test_a_cause_that_passes_is_waited_out(
    path: str, requests: int, service: RewardService
) -> None:
    out = reward(f"{service.url}/{path}", retries=3).forward_step(batch("a", "bb"))
    assert out["reward"].tolist() == [1, 2]
    assert service.count(f"/{path}") == requests


def test_a_busy_service_is_given_the_time_it_asks_for(service: RewardService) -> None:
    began = time.monotonic()
    reward(f"{service.url}/busy_once", retries=1).forward_step(batch("a"))
    assert time.monotonic() - began >= 1.0
    said = refused(f"{service.url}/busy_for_an_hour", retries=3)
    assert "status 503" in said
    assert "the next would begin 3600 s later, beyond the batch's 50 s" in said
    assert service.count("/busy_for_an_hour") == 1


# ---- what does not ----------------------------------------------------------------------------

WRONG = {
    "away": ["status 500: 'out of memory' in each of 2 tries"],
    "closes": ["broke the connection (RemoteProtocolError", "in each of 2 tries"],
    "refuses": ["status 404: 'no such model'"],
    "moved": ["status 302, a redirect to 'http://elsewhere/x': give the address itself"],
    "nonsense": ["what is not JSON with status 200: '<html>welcome</html>'"],
    "nothing": ["what is not JSON with status 200: an empty body"],
    "deep": ["what is not JSON with status 200: '[[["],
    "a_list": ["without a list, expected {\"rewards\": [...]}: '[1.0, 1.0]'"],
    "other_keys": ["without a list", "scores"],
    "too_few": ["answered 1 rewards, expected one for each of 2 samples: '{\"rewards\": [1.0]}'"],
    "nan": ["returned nan as 'reward', expected a finite number"],
    "text": ["returned '9' as 'reward', expected a number"],
    "endless": ["answered more than 1048576 bytes with status 200: '[["],
}
AGAIN = {"away", "closes"}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_answer_is_an_error_with_address_status_and_first_words(
    path: str, service: RewardService
) -> None:
    said = refused(f"{service.url}/{path}", retries=1)
    for word in WRONG[path]:
        assert word in said
    assert len(said) < 700
    assert service.count(f"/{path}") == (2 if path in AGAIN else 1)


@pytest.mark.parametrize("path", ["hangs", "drips"])
def test_a_service_that_takes_for_ever_is_left_at_the_limit(
    path: str, service: RewardService
) -> None:
    began = time.monotonic()
    said = refused(f"{service.url}/{path}", timeout_s=0.3, retries=1)
    assert "did not answer within 0.3 s in each of 2 tries" in said
    assert time.monotonic() - began < 5


def test_all_tries_of_a_batch_together_are_bounded(service: RewardService) -> None:
    began = time.monotonic()
    said = refused(f"{service.url}/hangs", timeout_s=0.3, total_timeout_s=1.0, retries=50)
    assert "beyond the batch's 1 s (total_timeout_s)" in said
    assert time.monotonic() - began < 5


def test_a_service_that_nobody_runs_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = refused(f"http://127.0.0.1:{port}/score", retries=1)
    assert "cannot be reached (ConnectError" in said
    assert "in each of 2 tries" in said


# ---- on_failure="score" -----------------------------------------------------------------------


def test_samples_of_a_request_that_fails_share_its_cause(service: RewardService) -> None:
    made = reward(
        f"{service.url}/bad_and_good", request_size=2, on_failure="score", failure_reward=-2.0
    )
    out = made.forward_step(batch("a", "b", "c", "bad", "d"))
    assert out["reward"].tolist() == [1, 1, -2, -2, 1]
    cause = "answered with status 500: 'cannot judge this'"
    assert out["reward_failure"] == [None, None, cause, cause, None]


def test_a_reward_that_is_null_fails_alone(service: RewardService) -> None:
    out = reward(f"{service.url}/picky", on_failure="score").forward_step(batch("a", "bad", "b"))
    assert out["reward"].tolist() == [1, 0, 1]
    assert out["reward_failed"].tolist() == [False, True, False]


def test_a_service_that_is_away_is_an_outage_and_no_score(service: RewardService) -> None:
    with pytest.raises(RewardError, match=r"all 2 samples.*outage.*status 500"):
        reward(f"{service.url}/away", on_failure="score").forward_step(batch("a", "b"))


# ---- secrets ----------------------------------------------------------------------------------


def test_the_token_is_sent_and_is_nowhere_else(
    service: RewardService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    made = reward(f"{service.url}/lengths", token_env="JUDGE_TOKEN")
    made.forward_step(batch("a"))
    assert service.requests[-1][1]["authorization"] == f"Bearer {TOKEN}"
    assert "you sent Bearer [token]!" in refused(f"{service.url}/forbids", token_env="JUDGE_TOKEN")
    assert "'Bearer [token]'" in refused(f"{service.url}/repeats", token_env="JUDGE_TOKEN")
    for kept in (cloudpickle.dumps(made), made.fingerprint(), repr(vars(made)).encode()):
        assert TOKEN.encode() not in kept
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(("value", "word"), [("", "is not set on"), ("a b", "holds spaces")])
def test_a_token_that_is_not_there_is_named_and_not_shown(
    value: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ConfigError, match=f"JUDGE_TOKEN .*{word}") as raised:
        reward("http://localhost/", token_env="JUDGE_TOKEN")
    assert "a b" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"url": "http://user:pass@host/x?key=1"}, r"\(http://host/x\) holds a user name"),
        ({"url": "ftp://host/x"}, "expected http"),
        ({"url": "localhost:80"}, "expected http"),
        ({"url": "http:///x"}, "expected http"),
        ({"url": "http://h", "retries": -1}, "retries of module"),
        ({"url": "http://h", "request_size": 0}, "request_size of module 'reward' is 0"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(options: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as raised:
        HTTPReward(**options).validate()
    assert "pass" not in str(raised.value).replace("password", "")
