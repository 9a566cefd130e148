from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Callable
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

    with pytest.raises(WaitTimeoutError, match=r"longer than 0.05 s for sample e000000-r000001"):
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
