"""Rewards of a program and of a service in whole runs: what fails is scored, kept, counted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import ConfigError, RewardError
from rlhf_flows.models import CommandReward, FunctionReward, HTTPReward
from rlhf_flows.modules.base import BaseModule
from tests.duckdb_process import query
from tests.end_to_end.whole_run import RUNTIME, assert_exactly_once, learn, samples
from tests.models.reward_service import RewardService
from tests.toys import ToyPolicy, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")

CHECK = """
import json, sys
digit = int(json.load(sys.stdin)["completion"])
if digit == 3: sys.exit("three does not compile")
print(json.dumps({"reward": 1 - abs(digit - 7) / 10, "exact": digit == 7}))
"""


def run(reward: BaseModule, store: Path, name: str, **runtime: Any) -> Any:
    engine = GRPOEngine(ToyPolicy("policy"), ToyTrainer("trainer"), reward, name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(16)])
    return learn(engine, store, name, num_episode=1, **runtime)


def assert_failures_are_kept(store: Path, name: str, result: Any, cause: str) -> None:
    """In Parquet, sample by sample; their share in the metrics of the episode."""
    assert_exactly_once(store, name, episodes=1)
    scored = samples(store, name, "scoring").set_index("sample_id")
    digits = samples(store, name).set_index("sample_id")["completion"].loc[scored.index]
    threes = digits == "3"
    assert 0 < threes.sum() < RUNTIME["sample_per_episode"] // 2
    failed = scored["reward_failure"].notna()
    assert (failed == scored["reward_failed"]).all()
    assert (failed | ~threes).all(), "every sample that must fail has its cause"
    assert scored["reward_failure"][failed].str.contains(cause, regex=False).all()
    assert (scored["reward"][failed] == -1).all()
    assert (scored["reward"][~failed] > 0).all()
    assert result.episodes[0]["reward_failed"] == pytest.approx(failed.mean())
    (counted,) = query(
        f"SELECT count(reward_failure), count(*) FROM '{store}/{name}/episodes/*/scoring/*.parquet'"
    )
    assert tuple(counted) == (failed.sum(), RUNTIME["sample_per_episode"])


@pytest.mark.slow
def test_a_run_with_rewards_of_a_program_scores_what_fails(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(CHECK)
    reward = CommandReward(
        command=[sys.executable, "-I", "-S", str(tmp_path / "check.py")],
        max_concurrency=2,
        on_failure="score",
        failure_reward=-1.0,
    )
    result = run(reward, tmp_path, "program")
    cause = "exited with status 1, and wrote 'three does not compile' to standard error"
    assert_failures_are_kept(tmp_path, "program", result, cause)
    scored = samples(tmp_path, "program", "scoring")
    assert (scored["reward_failed"] == (samples(tmp_path, "program")["completion"] == "3")).all()
    assert scored["exact"].sum() == (samples(tmp_path, "program")["completion"] == "7").sum()


@pytest.mark.slow
def test_a_run_with_rewards_of_a_service_scores_what_fails(tmp_path: Path) -> None:
    variable = "PREFECT_HOME"  # any that workers have, too
    token = os.environ[variable]
    with RewardService() as service:
        reward = HTTPReward(
            url=f"{service.url}/bad_and_good",
            token_env=variable,
            request_size=2,
            retries=1,
            on_failure="score",
            failure_reward=-1.0,
        )
        result = run(reward, tmp_path, "service")
        asked = len(service.requests)
        assert {sent["authorization"] for _, sent, _ in service.requests} == {f"Bearer {token}"}
    cause = "answered with status 500: 'cannot judge this' in each of 2 tries"
    assert_failures_are_kept(tmp_path, "service", result, cause)
    scored = samples(tmp_path, "service", "scoring")
    failed_requests = scored["reward_failed"].sum() // 2
    assert asked == RUNTIME["sample_per_episode"] // 2 + failed_requests  # these were asked twice
    for file in (tmp_path / "service").rglob("*"):
        assert file.is_dir() or token.encode() not in file.read_bytes(), f"{file} holds the token"


def hangs_on_three(completion: str) -> float:
    while completion == "3":
        pass
    return 1 - abs(int(completion) - 7) / 10


@pytest.mark.slow
def test_a_run_with_a_function_that_hangs_scores_what_it_hangs_on(tmp_path: Path) -> None:
    reward = FunctionReward(
        function=hangs_on_three, timeout_s=0.2, on_failure="score", failure_reward=-1.0
    )
    result = run(reward, tmp_path, "function")
    assert_failures_are_kept(tmp_path, "function", result, "took longer than 0.2 s")


@pytest.mark.long
def test_a_service_that_goes_away_ends_the_run_with_its_address(tmp_path: Path) -> None:
    with RewardService() as service:
        reward = HTTPReward(url=f"{service.url}/away", retries=0, on_failure="score")
        with pytest.raises(RewardError) as raised:
            run(reward, tmp_path, "outage")
    for word in ("reward.forward_step failed on scoring of episode 0", "all 8 samples", service.url,
                 "status 500: 'out of memory'"):  # fmt: skip
        assert word in str(raised.value)


@pytest.mark.long
def test_a_worker_without_the_token_names_the_variable(tmp_path: Path) -> None:
    reward = HTTPReward(url="http://127.0.0.1:9/", token_env="NOWHERE_SET")
    with pytest.raises(
        ConfigError, match=r"NOWHERE_SET \(token_env of module 'reward'\) is not set"
    ):
        run(reward, tmp_path, "token")
