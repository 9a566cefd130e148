"""How many ranks a module gets, from what it says of itself and what its section says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_flows.attempt.shares import Share, shares_of
from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.megatron.trainers import MegatronPolicyTrainer, MegatronSFTTrainer
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.settings import BackendSettings


def share(module: BaseModule, **section: Any) -> Share:
    config = EngineConfig.model_validate({"models": {"trainer": section}} if section else {})
    return shares_of(config, {"trainer": module}, trained={"trainer"})["trainer"]


def megatron(**sizes: Any) -> BaseModule:
    backend = BackendSettings(backend="megatron", **sizes)
    return on_backend(PolicyTrainer, "trainer", backend=backend, path="model")


@pytest.mark.parametrize(
    ("sizes", "section", "ranks"),
    [
        ({}, {}, 1),
        ({"tensor_parallel": 2}, {}, 2),
        ({"tensor_parallel": 2, "pipeline_parallel": 3}, {}, 6),
        ({"tensor_parallel": 2, "data_parallel": 3}, {}, 6),
        ({"tensor_parallel": 2}, {"num_gpu": 8}, 8),
        ({"tensor_parallel": 2}, {"ranks_per_replica": 4}, 4),
        ({"tensor_parallel": 2}, {"tensor_model_parallel_size": 2}, 2),
        ({"data_parallel": 2}, {"num_gpu": 2}, 2),
    ],
)
def test_ranks_are_as_many_as_the_sizes_ask_for(
    sizes: Mapping[str, int], section: Mapping[str, Any], ranks: int
) -> None:
    found = share(megatron(**sizes), **section)
    assert (found.num_replica, found.ranks_per_replica) == (1, ranks)


def test_torch_ranks_are_as_many_as_its_data_parallel_size() -> None:
    backend = BackendSettings(data_parallel=3)
    trainer = on_backend(PolicyTrainer, "trainer", backend=backend, path="model")
    assert type(trainer) is PolicyTrainer
    assert share(trainer).ranks_per_replica == 3
    assert share(
        on_backend(PolicyTrainer, "trainer", backend=BackendSettings(), path="m")
    ) == share(PolicyTrainer("trainer", path="m"))


@pytest.mark.parametrize(
    ("sizes", "section", "words"),
    [
        (
            {"tensor_parallel": 2},
            {"tensor_model_parallel_size": 4},
            ["models.trainer.tensor_model_parallel_size=4", "made with 2", "one place"],
        ),
        (
            {"tensor_parallel": 2, "data_parallel": 2},
            {"ranks_per_replica": 2},
            ["models.trainer.ranks_per_replica=2", "4 ranks", "data_parallel 2"],
        ),
        (
            {"tensor_parallel": 2},
            {"ranks_per_replica": 3},
            ["ranks_per_replica=3 is not a multiple", "product, 2"],
        ),
        ({"tensor_parallel": 2}, {"num_replica": 2}, ["num_replica is 2, but it is trained"]),
    ],
)
def test_numbers_that_differ_are_refused(
    sizes: Mapping[str, int], section: Mapping[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        share(megatron(**sizes), **section)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel": 2}, ["tensor_parallel=2", "backend='megatron'"]),
        ({"pipeline_parallel": 2}, ["pipeline_parallel=2", "backend='megatron'"]),
        ({"distributed_optimizer": True}, ["distributed_optimizer is Megatron's"]),
        ({"backend": "megatron", "tensor_parallel": 0}, ["tensor_parallel"]),
    ],
)
def test_a_backend_that_does_not_cut_models_is_not_asked_to(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValidationError) as refused:
        BackendSettings(**settings)
    for word in words:
        assert word in str(refused.value)


def test_a_trainer_of_another_kind_is_told_which_there_are() -> None:
    class Own(PolicyTrainer):
        pass

    with pytest.raises(ConfigError, match="Own does not train on Megatron here: it has DPOTrainer"):
        on_backend(Own, "own", backend=BackendSettings(backend="megatron"), path="model")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tensor_parallel": 3}, ["cannot be cut", "attention heads by tensor_parallel 3"]),
        ({"pipeline_parallel": 5}, ["layers by pipeline_parallel 5"]),
        ({"virtual_pipeline": 2}, ["interleaves the stages", "at least 2"]),
        ({"sequence_parallel": True}, ["sequence_parallel", "tensor_parallel is 1"]),
    ],
)
def test_a_topology_that_does_not_fit_the_model_is_refused_before_anything_starts(
    sizes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    model = build_tiny_qwen2(tmp_path, hidden_size=64, num_layers=2)
    backend = BackendSettings(backend="megatron", **sizes)
    with pytest.raises(ConfigError) as refused:
        MegatronPolicyTrainer("trainer", path=model, megatron=backend).validate()
    for word in words:
        assert word in str(refused.value)


def test_what_has_no_meaning_on_megatron_is_refused(tmp_path: Path) -> None:
    model = build_tiny_qwen2(tmp_path, hidden_size=64, num_layers=2)
    MegatronSFTTrainer("trainer", path=model).validate()
    with pytest.raises(ConfigError, match="layout of module 'trainer' is 'padded'"):
        MegatronSFTTrainer("trainer", path=model, layout="padded").validate()
    with pytest.raises(ConfigError, match="given backend='torch'"):
        MegatronSFTTrainer("trainer", path=model, megatron=BackendSettings()).validate()


def test_without_megatron_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_qwen2(tmp_path, hidden_size=64, num_layers=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install rlhf-flows\[megatron\]"):
        MegatronSFTTrainer("trainer", path=model).validate()
