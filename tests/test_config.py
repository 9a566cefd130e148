"""Configurations: strict, read alike from YAML, words and Python, checked at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_flows.config import MAY_CHANGE, EngineConfig
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments.evaluate import EvaluateConfig
from rlhf_flows.deployments.grpo import GRPOConfig
from rlhf_flows.deployments.quickstart import QuickstartConfig
from rlhf_flows.deployments.sft import SFTConfig
from rlhf_flows.errors import ConfigError

GRPO = ("model=m", "prompts=p.jsonl", "reward=r:f")


def test_words_yaml_and_python_give_the_same_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("runtime:\n  num_episode: 3\n  seed: 5\nstore:\n  url: here\n")
    by_file = load_config(EngineConfig, file=file)
    by_words = load_config(
        EngineConfig, ["runtime.num_episode=3", "runtime.seed=5", "store.url=here"]
    )
    by_python = EngineConfig.model_validate(
        {"runtime": {"num_episode": 3, "seed": 5}, "store": {"url": "here"}}
    )
    assert by_file == by_words == by_python


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("runtime: {num_episode: 3, seed: 5}\n")
    config = load_config(
        EngineConfig,
        ["runtime.seed=6"],
        file=file,
        defaults={"runtime": {"num_episode": 9, "keep_last": 4}},
    )
    assert (config.runtime.num_episode, config.runtime.seed, config.runtime.keep_last) == (3, 6, 4)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("runtime.num_episodes=3", "runtime.num_episode"),
        ("num_episode=3", "runtime.num_episode"),
        ("promts=x", "prompts"),
        ("grpo.klcoef=0.1", "grpo.kl_coef"),
        ("optimizer.lr=1e-4", "optimizer"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(word: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        load_config(GRPOConfig, [*GRPO, word])
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["runtime.num_episode=zero"], "runtime.num_episode"),
        (["runtime.num_episode=0"], "greater than 0, found 0"),
        (["runtime.num_inference_per_prompt=1"], "at least 2"),
        (["runtime.sample_per_episode=10"], "multiple of runtime.num_inference_per_prompt=8"),
        (["runtime.train_global_batch_size=1024"], "more than runtime.sample_per_episode"),
        (["runtime.train_global_batch_size=96"], "not a multiple of"),
        (["generation.temperature=0"], "nothing to compare"),
        (["grpo.temperature=0.5"], "generation.temperature"),
        (["grpo.aggregation=fixed"], "max_length"),
        (["models.policy=3"], "models.policy"),
        (["runtime=3"], "runtime"),
        (["seed"], "key=value"),
        (["runtime.seed.deep=1"], "seed"),
        (["runtime.seed=[1"], "not readable"),
    ],
)
def test_a_wrong_value_names_the_setting_and_the_remedy(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GRPOConfig, [*GRPO, *words])
    assert says in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'model' is missing: give it as model="):
        load_config(GRPOConfig, ["prompts=p", "reward=r:f"])


def test_a_schedule_needs_its_horizon() -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        load_config(SFTConfig, ["model=m", "dataset=d", "optimizer.schedule=cosine"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("- 1\n", "expected a mapping"), ("a: [\n", "not readable as YAML"), (None, "cannot be read")],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(EngineConfig, file=file)
    assert str(file) in str(caught.value)


def test_every_field_has_a_description() -> None:
    for model in (EngineConfig, GRPOConfig, SFTConfig, QuickstartConfig):
        nested = {"store", "cluster", "runtime", "runtime_env", "grpo", "sft", "optimizer"}
        for name, field in model.model_fields.items():
            assert field.description or name in nested, f"{model.__name__}.{name}"


def test_fields_that_may_change_exist() -> None:
    for name in MAY_CHANGE:
        first, _, rest = name.partition(".")
        if first == "flows":  # not of the configuration: the calls of each flow
            continue
        # Recipes', which have all that an engine's has.
        fields = {**EvaluateConfig.model_fields, **GRPOConfig.model_fields}
        assert first in fields
        if rest and "*" not in rest:
            nested = fields[first].annotation
            assert nested is not None
            assert rest in nested.model_fields, name
