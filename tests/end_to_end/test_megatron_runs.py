"""Whole runs whose trainers stand on Megatron, beside the same runs on torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows import GRPOEngine, RLHFEngine
from rlhf_flows.exports import exported_model
from rlhf_flows.flow import RunResult
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models import (
    FunctionReward,
    PolicyTrainer,
    PPOPolicyTrainer,
    Reference,
    TorchPolicy,
    ValueModel,
    ValueTrainer,
)
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.settings import BackendSettings, GRPOSettings, OptimizerSettings, PPOSettings
from tests.end_to_end.whole_run import shard_digests, weight_digests

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("services")]

FAST = OptimizerSettings(learning_rate=3e-3, eps=1e-6)
GENERATION = GenerationSettings(max_new_tokens=8)
TP2 = BackendSettings(backend="megatron", tensor_parallel=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen2(tmp_path_factory.mktemp("tiny"), hidden_size=128, num_layers=2)


def short(completion: str) -> float:
    return -float(len(completion))


def settings(store: Path, run: str, **runtime: Any) -> dict[str, Any]:
    small = {
        "num_episode": 2,
        "sample_per_episode": 32,
        "train_global_batch_size": 16,
        "generation_batch_size": 16,
        "num_inference_per_prompt": 4,
    }
    return {"run_name": run, "store": {"url": str(store)}, "runtime": {**small, **runtime}}


def grpo(model: Path, store: Path, run: str, backend: BackendSettings, **runtime: Any) -> RunResult:
    engine = GRPOEngine(
        TorchPolicy(path=model, generation=GENERATION),
        on_backend(
            PolicyTrainer,
            "trainer",
            backend=backend,
            path=model,
            optimizer=FAST,
            grpo=GRPOSettings(kl_coef=0.1),
        ),
        FunctionReward("reward", function=short),
        Reference(path=model),
        reference_ema=0.5,
    )
    engine.set_dataset([{"prompt": f"{i}+1="} for i in range(16)])
    return engine.learn(**settings(store, run, **runtime))


def same_course(found: RunResult, expected: RunResult) -> None:
    """The first episode samples by the same weights; later ones by weights that are nearly so."""
    for name, value in expected.episodes[0].items():
        if not name.endswith("seconds"):
            assert found.episodes[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.slow  # four runs
def test_grpo_on_two_ranks_of_megatron_goes_the_way_it_goes_on_torch(
    model: Path, tmp_path: Path
) -> None:
    expected = grpo(model, tmp_path, "torch", BackendSettings())
    found = grpo(model, tmp_path, "megatron", TP2)
    same_course(found, expected)
    # Cut after an episode and gone on with: the same bits. At another topology: nearly the same.
    for run, then in (("again", TP2), ("elsewhere", TP2.model_copy(update={"tensor_parallel": 1}))):
        grpo(model, tmp_path, run, TP2, num_episode=1)
        resumed = grpo(model, tmp_path, run, then)
        assert resumed.resumed_at == 1
        if then is TP2:
            for digests in (shard_digests, partial(weight_digests, module="trainer")):
                assert digests(tmp_path, run) == digests(tmp_path, "megatron")
        assert resumed.episodes[1]["loss"] == pytest.approx(found.episodes[1]["loss"], abs=1e-4)


@pytest.mark.long
def test_what_a_group_of_ranks_trained_is_a_folder_that_others_load(
    model: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grpo(model, tmp_path, "run", TP2, num_episode=1)
    folder = exported_model(str(tmp_path), "run")
    trained = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(model)
    assert trained.state_dict().keys() == start.state_dict().keys()
    moved = [
        float((w - start.state_dict()[n]).abs().max()) for n, w in trained.state_dict().items()
    ]
    assert all(0 < m < 0.1 for m in moved)
    assert AutoTokenizer.from_pretrained(folder)("1+1=").input_ids
    assert torch.isfinite(trained(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.long
def test_ppo_with_policy_and_value_on_megatron_goes_the_way_it_goes_on_torch(
    model: Path, tmp_path: Path
) -> None:
    def learn(run: str, backend: BackendSettings) -> RunResult:
        ppo = PPOSettings(value_norm="exp", adaptive_kl=True, kl_target=0.01, kl_horizon=200.0)
        trainers = [
            on_backend(kind, name, backend=backend, path=model, ppo=ppo, optimizer=FAST)
            for kind, name in ((PPOPolicyTrainer, "ppo_policy"), (ValueTrainer, "ppo_value"))
        ]
        engine = RLHFEngine(
            TorchPolicy(path=model, generation=GENERATION),
            Reference(path=model),
            FunctionReward("reward", function=short),
            ValueModel(path=model, ppo=ppo),
            *trainers,
        )
        engine.set_dataset([{"prompt": f"{i}+1="} for i in range(32)])
        return engine.learn(**settings(tmp_path, run, num_inference_per_prompt=1))

    expected = learn("torch", BackendSettings())
    same_course(learn("megatron", TP2), expected)
