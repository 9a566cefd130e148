"""The guide for users of ChatLearn says what the code says."""

from __future__ import annotations

from pathlib import Path

import rlhf_flows
from rlhf_flows.chatlearn_options import ELSEWHERE
from rlhf_flows.config import EngineConfig, ModelConfig, RuntimeConfig, RuntimeEnvConfig

GUIDE = (Path(__file__).parents[1] / "docs/from_chatlearn.md").read_text()


def test_every_option_that_is_refused_is_in_the_guide_with_its_reason() -> None:
    for section, options in ELSEWHERE.items():
        for option, reason in options.items():
            assert option in GUIDE, f"{section}.{option}"
            assert reason in GUIDE, f"{section}.{option}: {reason}"


def test_what_is_refused_is_no_field_and_what_the_guide_names_is_one() -> None:
    for section, model in (
        ("models.*", ModelConfig),
        ("runtime", RuntimeConfig),
        ("runtime_env", RuntimeEnvConfig),
    ):
        assert not set(ELSEWHERE[section]) & set(model.model_fields)
    same = GUIDE.split("| option | here |")[1].split("\n\n")[0]
    for line in same.splitlines()[2:]:
        first, *others = (word.strip("` ") for word in line.split("|")[1].split(","))
        section, _, _ = first.partition(".")
        is_nested = "batch_generation" in first
        names = ["batch_generation" if is_nested else first.rpartition(".")[2]]
        names += [other for other in others if not other.endswith("…")]
        model = {"models": ModelConfig, "runtime": RuntimeConfig, "runtime_env": RuntimeEnvConfig}
        for name in names:
            assert name in model[section].model_fields, name
    assert set(EngineConfig.model_fields) >= {"runtime_env", "models", "runtime"}


def test_every_name_of_chatlearn_that_the_guide_lists_can_be_imported() -> None:
    for name in (
        *("RLHFEngine", "DPOEngine", "OnlineDPOEngine", "GRPOEngine", "EvalEngine", "Engine"),
        *("Environment", "Trainer", "Evaluator", "BaseModule", "TorchModule", "MegatronModule"),
        *("DeepSpeedModule", "VLLMModule", "ControlDependencies", "RelaySampleManager", "init"),
    ):
        assert hasattr(rlhf_flows, name), name
