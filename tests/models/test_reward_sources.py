"""From settings to modules: each source by words of a command line, tried once at the start."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from rlhf_flows.config import MAY_CHANGE
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments.grpo import GRPOConfig, grpo
from rlhf_flows.errors import ConfigError, RewardError, RunConflictError
from rlhf_flows.models import (
    ClassifierReward,
    CommandReward,
    FunctionReward,
    HTTPReward,
    RewardModel,
)
from rlhf_flows.models.interfaces import register_interface
from rlhf_flows.models.reward_sources import build_reward, check_reward
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings
from rlhf_flows.store import open_run, open_store
from tests.models.reward_service import RewardService
from tests.models.tiny_classifier import build_sentiment_bert

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def settings(*words: str) -> RewardSettings:
    """What a command line says of a reward."""
    return load_config(GRPOConfig, ["model=m", "prompts=p", *words]).reward


class Lengths(BaseModule):
    def __init__(self, name: str, *, scale: float, offset: float = 0.0) -> None:
        super().__init__(name)
        self.scale, self.offset = scale, offset

    def setup(self) -> None: ...

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        lengths = [len(text) for text in data["completion"]]
        return {"reward": torch.tensor(lengths) * self.scale + self.offset}


def by_length(completion: str) -> int:
    return len(completion)


# ---- from words to modules --------------------------------------------------------------------


def test_a_name_alone_is_a_function_and_stays_one_in_run_json() -> None:
    found = settings("reward=tests.models.test_reward_sources:by_length")
    assert found == RewardSettings(function="tests.models.test_reward_sources:by_length")
    assert found.model_dump(mode="json") == "tests.models.test_reward_sources:by_length"
    assert RewardSettings.model_validate(found.model_dump()) == found
    asked = settings("reward.function=m:f", "reward.on_failure=score", "reward.timeout_s=2")
    made = build_reward(asked)
    assert isinstance(made, FunctionReward)
    assert (made.function, made.on_failure, made.sync_timeout_s) == ("m:f", "score", 2)
    assert RewardSettings.model_validate(asked.model_dump(mode="json")) == asked


def test_a_deployment_takes_a_name_or_fields() -> None:
    """Prefect checks what it is given by the schema of the flow's parameters."""
    schema = parameter_schema(grpo).model_dump_for_openapi()
    for found in ("m:f", {"url": "http://h/x", "on_failure": "score"}, {"command": ["a", "b"]}):
        config = {"model": "m", "prompts": "p", "reward": found}
        assert not validate({"config": config}, schema, raise_on_error=False)
        assert GRPOConfig.model_validate(config).reward == RewardSettings.model_validate(found)
    for found in (3, {"urll": "http://h/x"}):
        config = {"model": "m", "prompts": "p", "reward": found}
        assert validate({"config": config}, schema, raise_on_error=False)


def test_a_command_line_asks_for_a_classifier() -> None:
    made = build_reward(settings("reward.classifier=DIR", "reward.label=positive"), name="judge")
    assert isinstance(made, ClassifierReward)
    assert (made.name, made.path.name, made.label) == ("judge", "DIR", "positive")


def test_a_command_line_asks_for_a_program() -> None:
    made = build_reward(
        settings("reward.command=[python, -c, 'print(1)']", "reward.memory_mb=64",
                 "reward.max_concurrency=3", "reward.environment=[LICENSE]")
    )  # fmt: skip
    assert isinstance(made, CommandReward)
    assert made.command == ("python", "-c", "print(1)")
    assert (made.memory_mb, made.max_concurrency, made.timeout_s) == (64, 3, 60)
    assert made.environment == ("LICENSE",)


def test_a_command_line_asks_for_a_service() -> None:
    made = build_reward(
        settings("reward.url=http://h/x", "reward.token_env=T", "reward.request_size=4",
                 "reward.retries=0", "reward.timeout_s=7", "reward.failure_reward=-1")
    )  # fmt: skip
    assert isinstance(made, HTTPReward)
    assert (made.url, made.token_env, made.request_size) == ("http://h/x", "T", 4)
    assert (made.retries, made.timeout_s, made.failure_reward) == (0, 7, -1)


def test_a_reward_model_reads_the_policys_tokens(tmp_path: Path) -> None:
    policy = build_tiny_qwen2(tmp_path / "policy", hidden_size=32, num_layers=1)
    other = build_tiny_qwen2(tmp_path / "other", hidden_size=32, num_layers=1, characters="ab")
    made = build_reward(RewardSettings(model=str(policy)), policy_path=policy, dtype="bfloat16")
    assert isinstance(made, RewardModel)
    assert made.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"another vocabulary.*reward\.classifier"):
        build_reward(RewardSettings(model=str(other)), policy_path=policy)


def test_an_interface_is_found_by_its_place_or_by_its_name() -> None:
    register_interface("lengths", Lengths)
    for name in ("tests.models.test_reward_sources:Lengths", "lengths"):
        made = build_reward(
            settings(f"reward.interface={name}", "reward.args={scale: 2, offset: 1}")
        )
        assert made.name == "reward"
        assert made.forward_step({"completion": ["", "ab"]})["reward"].tolist() == [1, 5]
    with pytest.raises(ConfigError, match=r"lengts.*nearest: 'lengths'"):
        build_reward(RewardSettings(interface="lengts"))
    with pytest.raises(ConfigError, match=r"takes no 'scales' \(nearest: 'scale'\)"):
        build_reward(RewardSettings(interface="lengths", args={"scales": 2}))
    with pytest.raises(ConfigError, match="expected a class derived from ModelInterface"):
        build_reward(RewardSettings(interface="tests.models.test_reward_sources:by_length"))


def test_the_command_lines_of_the_guide_are_understood() -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    sources = set()
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        words = shlex.split(block.replace("\\\n", " "))
        sources.add(settings(*(word for word in words if word.startswith("reward"))).source)
    assert sources == {"function", "classifier", "command", "url", "interface"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reward.function=m:f", "reward.url=http://h"], "found function and url"),
        (["reward.on_failure=score"], "found none of them"),
        (["reward.url=http://user:pass@h/"], "name that as token_env"),
        (["reward.command=python check.py"], "expected a list of the program and its arguments"),
        (["reward.function=m:f", "reward.label=1"], "reward.label has no meaning for a function"),
        (["reward.model=m", "reward.on_failure=score"], "no meaning for a model: it is for"),
        (["reward.classifier=m", "reward.args={a: 1}"], "reward.args has no meaning"),
        (["reward.url=http://h", "reward.timeout_s=0"], "reward.timeout_s"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(*words)
    assert says in str(raised.value)
    assert "pass@" not in str(raised.value)


def test_no_field_takes_a_token() -> None:
    with pytest.raises(ValidationError, match="token"):
        RewardSettings.model_validate({"url": "http://h", "token": "s3cr3t"})


# ---- asked once -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sentiment_bert(tmp_path_factory.mktemp("bert"), steps=1)


def test_every_source_that_works_passes(bert: Path) -> None:
    with RewardService() as service:
        for found in (
            RewardSettings(function="tests.models.test_reward_sources:by_length"),
            RewardSettings(classifier=str(bert)),
            RewardSettings(command=(sys.executable, "-c", "print(1)")),
            RewardSettings(url=f"{service.url}/lengths"),
            RewardSettings(interface="tests.models.test_reward_sources:Lengths", args={"scale": 1}),
        ):
            check_reward(found, ROWS)
        ((_, _, sent),) = service.requests
    assert sent == [{"prompt": "1+1=", "answer": "2", "completion": "", "seed": 0}]


@pytest.mark.parametrize("on_failure", ["stop", "score"])
def test_a_service_that_does_not_answer_is_an_error_before_the_run(on_failure: Any) -> None:
    with RewardService() as service:
        began = time.monotonic()
        found = RewardSettings(
            url=f"{service.url}/hangs", timeout_s=0.2, retries=0, on_failure=on_failure
        )
        with pytest.raises(RewardError, match=r"did not answer within 0.2 s.*'1\+1='"):
            check_reward(found, ROWS)
        assert time.monotonic() - began < 5


def test_a_program_that_fails_for_nothing_at_all_is_let_through_as_a_score(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = {"command": (sys.executable, "-c", "import sys; sys.exit('does not compile')")}
    with pytest.raises(RewardError, match="does not compile"):
        check_reward(RewardSettings.model_validate(failing), ROWS)
    caplog.set_level(logging.WARNING)
    check_reward(RewardSettings.model_validate({**failing, "on_failure": "score"}), ROWS)
    assert "does not compile" in caplog.text


def test_run_json_of_a_service_holds_what_was_given_alone() -> None:
    found = settings("reward.url=http://h/x", "reward.token_env=JUDGE", "reward.retries=3")
    assert found.model_dump(mode="json") == {"url": "http://h/x", "token_env": "JUDGE"}


def test_a_run_that_ended_over_its_service_goes_on_with_another(tmp_path: Path) -> None:
    store = open_store(tmp_path)

    def start(*words: str) -> None:
        reward = settings(*words).model_dump(mode="json")
        open_run(store, "mine", config={"reward": reward}, may_change=MAY_CHANGE)

    start("reward.url=http://old/x")
    start("reward.url=http://new/y", "reward.token_env=T", "reward.on_failure=score")
    with pytest.raises(RunConflictError, match=r"reward\.command: \(absent\) then"):
        start("reward.command=[judge]")
