"""The ready-made roles of DPO, online DPO and reward models in whole runs, on a tiny model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows import DPOEngine, EvalEngine, OnlineDPOEngine, RewardModelEngine, RLHFEngine
from rlhf_flows.exports import exported_model
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models import (
    DPOTrainer,
    FunctionReward,
    OnlineDPOTrainer,
    PPOPolicyTrainer,
    PreferenceReference,
    Reference,
    RewardModel,
    RewardTrainer,
    TorchPolicy,
    ValueModel,
    ValueTrainer,
)
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.settings import DPOSettings, OptimizerSettings, PPOSettings
from tests.end_to_end.whole_run import samples, shard_digests, weight_digests

# Processes of torch and transformers, a few for each run.
pytestmark = [pytest.mark.long, pytest.mark.timeout(600), pytest.mark.usefixtures("services")]

FAST = OptimizerSettings(learning_rate=3e-3)
PAIRS = [
    {"prompt": f"{i}+1=", "pos_answers": [str(i + 1), f"{i + 1}."], "neg_answers": [str(i), "?"]}
    for i in range(16)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen2(tmp_path_factory.mktemp("tiny"), hidden_size=64, num_layers=2)


def settings(store: Path, run: str, **runtime: Any) -> dict[str, Any]:
    small = {
        "num_episode": 3,
        "sample_per_episode": 32,
        "train_global_batch_size": 16,
        "generation_batch_size": 16,
        "num_inference_per_prompt": 1,
    }
    return {"run_name": run, "store": {"url": str(store)}, "runtime": {**small, **runtime}}


def test_dpo_on_every_pair_of_a_file_of_lists(model: Path, tmp_path: Path) -> None:
    def learn(run: str, **runtime: Any) -> Any:
        engine = DPOEngine(PreferenceReference(path=model), DPOTrainer(path=model, optimizer=FAST))
        return engine.set_dataset(PAIRS).learn(**settings(tmp_path, run, **runtime))

    result = learn("dpo")
    assert set(result.seconds) == {"scoring", "training"}
    assert result.episodes[2]["loss"] < result.episodes[0]["loss"] < 0.7
    assert result.episodes[2]["accuracy"] > 0.75
    scored = samples(tmp_path, "dpo", "scoring").query("episode == 0")
    assert len(set(zip(scored["prompt"], scored["chosen"], strict=True))) == 32
    assert {"chosen_ids", "rejected_ids", "reference_chosen_logprob"} <= set(scored.columns)
    # Cut after an episode, and gone on with: the same bits.
    learn("again", num_episode=1)
    assert learn("again").resumed_at == 1
    for digests in (shard_digests, partial(weight_digests, module="ppo_policy")):
        assert digests(tmp_path, "again") == digests(tmp_path, "dpo")


def test_a_reward_model_that_was_trained_is_evaluated_from_its_folder(
    model: Path, tmp_path: Path
) -> None:
    engine = RewardModelEngine(
        RewardTrainer(path=model, optimizer=FAST), RewardModel("follower", path=model)
    )
    engine.set_dataset(PAIRS).set_eval_dataset(PAIRS[:8])
    result = engine.learn(**settings(tmp_path, "reward"))
    assert result.evaluations[3]["accuracy"] > 0.9 > result.evaluations[0]["accuracy"]
    folder = exported_model(str(tmp_path), "reward")
    evaluation = EvalEngine(RewardModel("reward", path=folder)).set_dataset(PAIRS[:8])
    found = evaluation.learn(**settings(tmp_path, "look")).evaluations[0]
    assert found["accuracy"] == result.evaluations[3]["accuracy"]
    assert found["reward_margin"] == pytest.approx(result.evaluations[3]["reward_margin"], rel=1e-5)


def short(completion: str) -> float:
    return -float(len(completion))


def test_online_dpo_learns_from_its_own_samples(model: Path, tmp_path: Path) -> None:
    engine = OnlineDPOEngine(
        TorchPolicy(path=model, generation=GenerationSettings(max_new_tokens=8)),
        Reference(path=model),
        FunctionReward("reward", function=short),
        OnlineDPOTrainer(path=model, optimizer=FAST, dpo=DPOSettings(beta=0.1)),
    )
    engine.set_dataset([{"prompt": f"{i}+1="} for i in range(32)])
    result = engine.learn(
        **settings(
            tmp_path, "online", num_inference_per_prompt=4, sample_per_episode=64, num_episode=4
        )
    )
    first = result.episodes[0]
    assert first["loss"] == pytest.approx(0.69, abs=0.05)
    assert {"reference_logprobs", "reward"} <= set(samples(tmp_path, "online", "scoring").columns)
    assert first["rows_trained"] + first["rows_filtered"] == 64
    assert first["rows_trained"] == 2 * first["pairs"]  # of all updates


def far(completion: str) -> float:
    return 1000.0 - 100.0 * len(completion)


def test_ppo_with_all_that_steers_it(model: Path, tmp_path: Path) -> None:
    """Values normalized and bootstrapped, a coefficient that adapts, a reference that follows, with
    several updates an episode and samples one version old; cut, and gone on with.
    """
    ppo = PPOSettings(
        value_norm="exp", adaptive_kl=True, kl_target=0.01, kl_horizon=200.0, early_stop_ratio=5.0,
        bootstrap_truncated=True,
    )  # fmt: skip

    def learn(run: str, **runtime: Any) -> Any:
        engine = RLHFEngine(
            TorchPolicy(path=model, generation=GenerationSettings(max_new_tokens=8)),
            Reference(path=model),
            FunctionReward("reward", function=far),
            ValueModel(path=model, ppo=ppo),
            PPOPolicyTrainer(path=model, ppo=ppo, optimizer=FAST),
            ValueTrainer(path=model, ppo=ppo, optimizer=FAST),
            reference_ema=0.5,
        )
        engine.set_dataset([{"prompt": f"{i}+1="} for i in range(32)])
        return engine.learn(**settings(tmp_path, run, max_staleness=1, **runtime))

    result = learn("ppo")
    coefs = [
        [found[f"{name}/kl_coef"] for found in result.episodes.values()]
        for name in ("ppo_policy", "ppo_value")
    ]
    assert coefs[0] == coefs[1]
    assert len(set(coefs[0])) > 1
    scored = samples(tmp_path, "ppo", "scoring").set_index("episode")
    mean = {e: float(scored.loc[e]["values"].map(lambda v: v.mean()).mean()) for e in range(3)}
    rewards = {e: float(scored.loc[e]["reward"].mean()) for e in range(3)}
    assert mean[0] == mean[1] == 0.0  # version 0: nobody knew anything of returns
    assert mean[2] == pytest.approx(rewards[2], abs=300)
    assert float(scored.loc[2]["normalized_values"].map(lambda v: abs(v).max()).max()) < 20
    assert {"last_value", "reference_logprobs"} <= set(scored.columns)
    assert result.episodes[2]["ppo_policy/early_stopped"] == 0.0
    learn("again", num_episode=2)
    assert learn("again").resumed_at == 2
    assert shard_digests(tmp_path, "again") == shard_digests(tmp_path, "ppo")
    for module in ("ppo_policy", "ppo_value"):
        assert weight_digests(tmp_path, "again", module) == weight_digests(tmp_path, "ppo", module)
