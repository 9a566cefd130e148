"""Run defaults: what a run takes from the block, what it keeps, and that secrets stay out of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_flows.blocks import EpisodeStore, RayCluster, RunDefaults, apply_defaults
from rlhf_flows.cli import app
from rlhf_flows.config import RuntimeEnvConfig
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments import find_recipe
from rlhf_flows.deployments.grpo import GRPOConfig
from rlhf_flows.errors import ConfigError

SECRET = "s3cr3t-of-the-test"
GIVEN: dict[str, Any] = {"model": "base", "prompts": "p.jsonl", "reward": "my.rewards:score"}


def grpo(**settings: Any) -> GRPOConfig:
    return load_config(GRPOConfig, defaults={**GIVEN, **settings})


def team(**fields: Any) -> RunDefaults:
    return RunDefaults(
        cluster=RayCluster(
            address="10.0.0.7:6379", token=SECRET, runtime_env=RuntimeEnvConfig(pip=["sympy"])
        ),
        store=EpisodeStore(url="s3://team/runs", access_key_id="key", secret_access_key=SECRET),
        model_folder="/models",
        settings={"runtime": {"keep_last": 5, "seed": 7}, "optimizer": {"learning_rate": 1e-4}},
        **fields,
    )


def test_a_run_that_says_nothing_takes_all_of_the_block() -> None:
    config = team().apply(grpo())
    assert config.cluster.address == "10.0.0.7:6379"
    assert config.runtime_env.pip == ["sympy"]
    assert config.store.url == "s3://team/runs"
    assert config.model == "/models/base"
    assert (config.runtime.keep_last, config.runtime.seed) == (5, 7)
    assert config.optimizer.learning_rate == 1e-4
    assert config.prompts == grpo().prompts
    assert SECRET not in repr(config)


def test_what_a_run_says_itself_wins_field_by_field() -> None:
    config = team().apply(grpo(store={"url": "mine"}, runtime={"seed": 8}, model="/other/base"))
    assert config.store.url == "mine"
    assert (config.runtime.keep_last, config.runtime.seed) == (5, 8)
    assert config.model == "/other/base"
    assert config.cluster.address == "10.0.0.7:6379"


def test_a_form_that_sends_every_default_asks_for_nothing_by_that() -> None:
    """The UI fills the whole form in; only what a person changed is asked for."""
    sent = GRPOConfig.model_validate({**grpo().model_dump(), "runtime": {"seed": 9}})
    everything = GRPOConfig.model_validate(sent.model_dump())
    assert everything.store.model_fields_set  # said by nobody, and yet sent
    assert team().apply(everything) == team().apply(grpo(runtime={"seed": 9}))


def test_a_recipe_with_other_defaults_keeps_what_its_user_sets_back() -> None:
    mine = find_recipe("grpo").derived("mine", runtime={"num_episode": 3, "seed": 4})
    plain = load_config(mine.config, defaults=GIVEN)
    assert team().apply(plain).runtime.num_episode == 3
    assert team().apply(plain).runtime.seed == 7
    back = load_config(mine.config, defaults={**GIVEN, "runtime": {"num_episode": 10}})
    assert team().apply(back).runtime.num_episode == 10


def test_the_empty_block_changes_nothing() -> None:
    config = grpo(runtime={"seed": 3}, models={"policy": {"num_gpu": 2}})
    assert RunDefaults().apply(config) == config


@pytest.mark.parametrize("model", ["run:sft-1@3", "/models/other"])
def test_only_a_model_that_is_named_alone_is_looked_for_in_the_folder(model: str) -> None:
    assert team().apply(grpo(model=model)).model == model


def test_a_setting_that_the_recipe_does_not_have_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.num_episode"):
        RunDefaults(settings={"runtime": {"num_episodes": 3}}).apply(grpo())


def test_a_part_that_is_said_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a block for it"):
        RunDefaults(store=EpisodeStore(url="a"), settings={"store": {"url": "b"}})


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_is_applied_by_its_name_with_the_secrets_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    for name in names:
        monkeypatch.setenv(name, "before")  # so that the test leaves nothing behind
    block = team()
    block.save("team", overwrite=True)
    found = asyncio.run(apply_defaults(grpo(), "team"))
    assert found == block.apply(grpo())
    assert [os.environ[n] for n in names] == [SECRET, SECRET, "key"]
    assert SECRET not in f"{block!r} {block} {block.model_dump_json()} {found!r}"


@pytest.mark.usefixtures("prefect_server")
def test_the_server_shows_no_secret_of_a_block_within_a_block() -> None:
    from prefect.client.orchestration import get_client

    block = team()
    block.save("masked", overwrite=True)
    with get_client(sync_client=True) as client:
        document = client.read_block_document_by_name(
            "masked", RunDefaults.get_block_type_slug(), include_secrets=False
        )
    assert document.data["cluster"]["address"] == "10.0.0.7:6379"
    assert SECRET not in document.model_dump_json()


@pytest.mark.usefixtures("prefect_server")
def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no block 'RLHF Run Defaults' of this name.*blocks ls"):
        asyncio.run(apply_defaults(grpo(), "nobody"))


def test_no_name_is_no_block() -> None:
    config = grpo()
    assert asyncio.run(apply_defaults(config, None)) is config


def test_train_takes_a_block_by_name(prefect_server: str, tmp_path: Path) -> None:
    here = RunDefaults(model_folder=str(tmp_path / "models"))
    here.save("here", overwrite=True)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    words = [f"prompts={tmp_path}/p.jsonl", "model=base", "reward=operator:eq"]
    for name, says in {"here": f"{tmp_path}/models/base", "nobody": "nobody"}.items():
        done = CliRunner().invoke(app, ["train", "grpo", "--defaults", name, *words])
        assert isinstance(done.exception, ConfigError), done.output
        assert says in str(done.exception)
