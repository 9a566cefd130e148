from __future__ import annotations

import asyncio
import pickle
import random
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_flows.data.batch import Batch, select
from rlhf_flows.errors import ConfigError, RewardError, WaitTimeoutError
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.reward_function import batch_reward

SORT = "rlhf_flows.deployments.sort_digits"
BATCH: Batch = {
    "sample_id": [f"e000000-r00000{i}-s00" for i in range(4)],
    "seed": torch.tensor([7, 8, 9, 7]),
    "prompt": ["a", "b", "c", "d"],
    "completion": ["x", "xx", "", "xxxx"],
    "response_ids": [torch.arange(n) for n in (1, 2, 0, 4)],
    "answer": ["x", "yy", "", "zzzz"],
    "number": torch.tensor([1, 2, 3, 4]),
}


def scored(function: str | Callable[..., Any], data: Batch = BATCH, **options: Any) -> Batch:
    reward = FunctionReward("reward", function=function, **options)
    reward.validate()
    reward.setup()
    return reward.forward_step(data)


def rewards(function: str | Callable[..., Any], **options: Any) -> list[float]:
    column = scored(function, **options)["reward"]
    assert column.dtype == torch.float32
    numbers: list[float] = column.tolist()
    return numbers


# ---- how a function is called ---------------------------------------------------------------


def test_a_function_gets_the_columns_that_its_parameters_name() -> None:
    assert rewards(lambda completion, answer: completion == answer) == [1, 0, 1, 0]
    assert rewards(lambda prompt, completion, number: number * len(completion)) == [1, 4, 0, 16]
    assert rewards(lambda completion, missing=2: missing) == [2, 2, 2, 2]


def test_a_function_with_keywords_gets_every_column() -> None:
    def function(**columns: Any) -> float:
        assert set(columns) == set(BATCH)
        assert isinstance(columns["response_ids"], torch.Tensor)
        return float(columns["number"])

    assert rewards(function) == [1, 2, 3, 4]


def test_plural_parameters_take_the_whole_batch() -> None:
    def function(prompts: list[str], completions: list[str], number: list[int]) -> list[float]:
        return [len(c) + n for c, n in zip(completions, number, strict=True)]

    assert rewards(function) == [2, 4, 3, 8]


def test_a_marked_function_takes_the_whole_batch() -> None:
    @batch_reward
    def function(completion: list[str], **others: Any) -> torch.Tensor:
        return torch.tensor([len(c) for c in completion])

    assert rewards(function) == [1, 2, 0, 4]


@pytest.mark.parametrize("batched", [False, True])
def test_an_async_function_is_awaited(batched: bool) -> None:
    async def one(completion: str) -> int:
        await asyncio.sleep(0.01 * (3 - len(completion)))
        return len(completion)

    async def all_of_them(completions: list[str]) -> list[int]:
        await asyncio.sleep(0)
        return [len(c) for c in completions]

    assert rewards(all_of_them if batched else one) == [1, 2, 0, 4]


async def test_an_async_function_is_awaited_inside_a_running_loop() -> None:
    async def function(completion: str) -> int:
        return len(completion)

    assert rewards(function) == [1, 2, 0, 4]


def test_no_more_calls_are_in_flight_than_allowed() -> None:
    running = most = 0

    async def function(completion: str) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return 0

    rewards(function, max_concurrency=2)
    assert most == 2


def test_a_dict_of_numbers_becomes_columns_beside_the_reward() -> None:
    out = scored(f"{SORT}:reward", {**BATCH, "answer": ["x", "yy", "z", "xxxx"]})
    assert {name: column.tolist() for name, column in out.items()} == {
        "reward": [1, 0, 0, 1],
        "exact": [1, 0, 0, 1],
    }
    listed = scored(lambda completions: {"reward": [0.0] * 4, "k": np.arange(4)})
    assert listed["k"].tolist() == [0, 1, 2, 3]


def test_an_empty_batch_has_an_empty_reward() -> None:
    assert scored(lambda completion: 1, select(BATCH, []))["reward"].shape == (0,)


def test_random_rewards_follow_from_the_seed_of_the_sample() -> None:
    def function(completion: str) -> float:
        return random.random() + float(np.random.rand())

    first = rewards(function)
    assert rewards(function) == first
    assert first[0] == first[3]
    assert len(set(first)) == 3


def test_the_random_state_of_the_process_is_left_as_it_was() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    rewards(lambda completion: random.random())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


# ---- what is refused, and what is said ------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reward", "package.module:function"),
        (f"{SORT}:rewrd", "no 'rewrd'.*nearest: 'reward'"),
        ("rlhf_flows.deployments.sort_digit:reward", "no module.*nearest: 'sort_digits'"),
        ("nump:reward", "no module 'nump'.*nearest: 'numpy'"),
        (f"{SORT}:HELD_OUT", "type int, expected a function"),
        (lambda text: 1, r"takes \(text\), and no completion"),
        (len, "by position only"),
    ],
)
def test_what_is_no_reward_function_is_refused_before_any_work(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        FunctionReward("reward", function=function).validate()


def test_a_module_that_raises_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_at_import.py").write_text("1 / 0")
    (tmp_path / "imports_nothing_there.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="raises_at_import raises ZeroDivisionError"):
        FunctionReward("reward", function="raises_at_import:reward").validate()
    with pytest.raises(RewardError, match="itself imports 'not_there_at_all'"):
        FunctionReward("reward", function="imports_nothing_there:reward").validate()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion, number: 1 / (number - 3), "ZeroDivisionError.*r000002.*prompt 'c'"),
        (lambda completion, number: float("nan") if number == 2 else 1, "nan as 'reward'.*r000001"),
        (lambda completion: float("inf"), "inf as 'reward'"),
        (lambda completion: "good", "'good' as 'reward', expected a number"),
        (lambda completion: None, "None as 'reward'"),
        (lambda completion: {"score": 1}, "without 'reward'"),
        (lambda completion: {"reward": 1, "k": "v"}, "'v' as 'k'"),
        (lambda completion: {"reward": 1, "prompt": 2}, "'prompt', which is a column already"),
        (lambda completions: [1, 2], "returned 2 values, expected one for each of 4"),
        (lambda completions: 1.0, "expected a list of 4 numbers"),
        (lambda completions: "1234", "expected a list of 4 numbers"),
        (lambda completion, answr: 1, "needs 'answr'.*nearest: 'answer'"),
        (
            lambda completion, number: {"reward": 1, **({"k": 1} if number > 2 else {})},
            "give 'k' for every sample or for none",
        ),
    ],
)
def test_an_unusable_reward_is_an_error_with_its_sample(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        scored(function)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_async_function_that_raises_is_named_with_its_sample() -> None:
    async def function(completion: str, number: int) -> float:
        return 1 / (number - 3)

    with pytest.raises(RewardError, match=r"ZeroDivisionError.*r000002") as caught:
        scored(function)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_call_that_takes_too_long_may_be_tried_again() -> None:
    async def function(completion: str) -> int:
        await asyncio.sleep(60 if completion == "xx" else 0)
        return 0

    with pytest.raises(WaitTimeoutError, match=r"longer than 0.05 s, for sample e000000-r000001"):
        scored(function, timeout_s=0.05)


@pytest.mark.parametrize("options", [{"max_concurrency": 0}, {"timeout_s": 0.0}])
def test_limits_that_allow_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FunctionReward("reward", function=lambda completion: 1, **options).validate()


def test_a_mended_function_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mended_reward.py"
    source.write_text("def reward(completion): return 1")
    monkeypatch.syspath_prepend(tmp_path)
    before = FunctionReward("reward", function="mended_reward:reward").fingerprint()
    assert FunctionReward("reward", function="mended_reward:reward").fingerprint() == before
    source.write_text("def reward(completion): return 2")
    assert FunctionReward("reward", function="mended_reward:reward").fingerprint() != before


# ---- on_failure="score" ---------------------------------------------------------------------


def returns_or_raises(completion: str, number: int) -> Any:
    if number == 1:
        raise KeyError("no such word")
    return {"reward": float("nan") if number == 2 else number, "length": len(completion)}


def test_samples_that_fail_get_the_failure_reward_and_keep_their_cause() -> None:
    out = scored(returns_or_raises, on_failure="score", failure_reward=-1.0)
    assert out["reward"].tolist() == [-1, -1, 3, 4]
    assert out["length"].tolist() == [0, 0, 0, 4]  # 0 of those that failed
    assert out["reward_failure"] == [
        "raised KeyError: 'no such word'",
        "returned nan as 'reward', expected a finite number",
        None,
        None,
    ]
    assert out["reward_failed"].tolist() == [True, True, False, False]


def test_a_batch_that_fails_as_a_whole_is_an_outage_and_no_score() -> None:
    def away(completion: str) -> float:
        raise ConnectionError("the judge is away")

    def all_away(completions: list[str]) -> list[float]:
        raise ConnectionError("the judge is away")

    for function in (away, all_away):
        with pytest.raises(RewardError, match=r"all 4 samples.*outage.*the judge is away"):
            scored(function, on_failure="score")
    alone = scored(away, select(BATCH, [2]), on_failure="score", failure_reward=2.0)
    assert alone["reward"].tolist() == [2.0], "one sample says nothing of an outage"


def test_an_outage_of_calls_without_end_is_not_tried_again_and_again() -> None:
    async def silent(completion: str) -> float:
        await asyncio.sleep(60)
        return 1.0

    with pytest.raises(RewardError, match=r"all 4 samples.*longer than 0.05 s"):
        scored(silent, on_failure="score", timeout_s=0.05)


def test_single_values_of_a_batch_function_fail_alone() -> None:
    out = scored(lambda completions: [1, None, 10**400, 1e39], on_failure="score")
    assert [cause is None for cause in out["reward_failure"]] == [True, False, False, False]
    assert torch.isfinite(out["reward"]).all(), "what float32 cannot hold is no reward"


def hangs_in_a_loop(completion: str) -> int:
    while completion == "xx":
        pass
    return 1


def hangs_in_a_regular_expression(completion: str) -> int:
    return 1 if completion != "xx" else len(re.findall(r"(a+)+$", "a" * 40 + "b"))


def hangs_and_catches(completion: str) -> int:
    try:
        return hangs_in_a_loop(completion)
    except Exception:  # as a user's function may: the limit must pass it
        return 2


def waits(completion: str) -> int:
    time.sleep(60 if completion == "xx" else 0)
    return 1


@pytest.mark.parametrize(
    "function", [hangs_in_a_loop, hangs_in_a_regular_expression, hangs_and_catches, waits]
)
def test_a_plain_function_that_hangs_is_stopped_at_its_limit(function: Any) -> None:
    began = time.monotonic()
    out = scored(function, on_failure="score", timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert out["reward"].tolist() == [1, 0, 1, 1]
    assert out["reward_failure"][1] == "took longer than 0.2 s"
    with pytest.raises(WaitTimeoutError, match=r"longer than 0.2 s, for sample .*r000001"):
        scored(function, timeout_s=0.2)


def test_a_function_is_stopped_outside_of_the_main_thread_too() -> None:
    with ThreadPoolExecutor(max_workers=1) as thread:
        out = thread.submit(scored, hangs_and_catches, on_failure="score", timeout_s=0.2).result(
            timeout=30
        )
        assert thread.submit(sum, range(100_000)).result() == 4999950000, "no late exception"
    assert out["reward"].tolist() == [1, 0, 1, 1]


def test_the_alarm_of_somebody_else_goes_on_after_a_limit() -> None:
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.signal(signal.SIGALRM, lambda *_: None)
        mine = signal.getsignal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 1000.0, 7.0)
        scored(lambda completion: time.sleep(0.05) or 1, timeout_s=5.0)
        left_s, every_s = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < left_s <= 999.8
        assert every_s == pytest.approx(7.0)
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize(
    "options", [{"on_failure": "ignore"}, {"on_failure": "score", "failure_reward": float("nan")}]
)
def test_ways_to_fail_that_do_not_exist_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected 'stop' or 'score', and a finite number"):
        FunctionReward("reward", function=lambda completion: 1, **options).validate()


def test_the_names_of_failures_are_not_free() -> None:
    with pytest.raises(RewardError, match="'reward_failed', which is a column already"):
        scored(lambda completion: {"reward": 1, "reward_failed": 0})
