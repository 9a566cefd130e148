"""What steers PPO from outside of its loss: the coefficient that adapts, the step not taken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_flows.data.batch import Batch, select
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.settings import GRPOSettings, OptimizerSettings, PPOSettings
from tests.models.test_policy_trainer import episode
from tests.models.test_ppo import KINDS, samples, train, trainer, weights

ADAPTS = {"adaptive_kl": True, "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 100.0}


def parts(data: Batch, num_updates: int = 3) -> list[Batch]:
    width = len(data["response_ids"]) // num_updates
    return [select(data, range(i * width, (i + 1) * width)) for i in range(num_updates)]


def one_episode(made: Any, data: Batch, *, passes: int = 1) -> list[float]:
    """As a worker trains it; the coefficient at each step."""
    made.before_episode(0)
    batches = parts(data) * passes
    if made.wants_episode(len(batches)):
        ready = made.before_updates([made.prepare_batch(b) for b in batches])
        steps = [made.train_step(made.micro_batches(b), 0) for b in ready]
    else:
        steps = [train(made, b) for b in batches]
    made.after_episode(0)
    return [step["kl_coef"] for step in steps]


def divergence(data: Batch) -> float:
    rows = zip(data["behaviour_logprobs"], data["reference_logprobs"], strict=True)
    return sum(float((a.double() - b.double()).sum()) for a, b in rows) / len(data["reward"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_coefficient_moves_once_an_episode_by_the_formula(
    tiny: Path, kind: Callable[..., Any]
) -> None:
    made, coef = trainer(kind, tiny, ppo=ADAPTS), 0.1
    for seed in range(3):
        data = samples(seed=seed)
        assert one_episode(made, data, passes=2) == pytest.approx([coef] * 6)
        error = min(max(divergence(data) / 0.5 - 1, -0.2), 0.2)
        coef *= 1 + error * 15 / 100  # each sample once, however many passes
    assert made.kl_controller.coef == pytest.approx(coef, rel=1e-6)
    assert abs(coef - 0.1) > 0.005


def test_policy_and_value_have_the_same_coefficient_and_returns(tiny: Path) -> None:
    policy, value = (trainer(kind, tiny, ppo=ADAPTS) for kind in KINDS)
    for seed in range(3):
        data = samples(seed=seed)
        assert one_episode(policy, data) == one_episode(value, data)
    data = samples(seed=9)
    returns = [r[0] for r in value.prepare_batch(data)["returns"]]
    assert torch.equal(policy.prepare_batch(data)["return"], torch.stack(returns))


@pytest.mark.parametrize("kind", KINDS)
def test_the_coefficient_is_kept_by_a_checkpoint(
    tiny: Path, tmp_path: Path, kind: Callable[..., Any]
) -> None:
    first = trainer(kind, tiny, ppo=ADAPTS)
    for seed in range(2):
        one_episode(first, samples(seed=seed))
    first.save_state(tmp_path)
    saved = weights(first)
    expected = [one_episode(first, samples(seed=seed)) for seed in (2, 3)]
    second = trainer(kind, tiny, ppo=ADAPTS)
    one_episode(second, samples(seed=7))
    second.prepare_batch(samples(seed=8))  # and was killed in the next one
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert [one_episode(second, samples(seed=seed)) for seed in (2, 3)] == expected
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_adaptive_kl_nothing_moves_and_nothing_is_said(tiny: Path, kind: Any) -> None:
    made = trainer(kind, tiny, ppo={"kl_coef": 0.1})
    made.before_episode(0)
    assert "kl_coef" not in train(made, samples())
    made.after_episode(0)
    assert made.kl_controller.coef == 0.1
    assert not made.training_tensors()
    with pytest.raises(ValidationError, match="0 stays 0"):
        PPOSettings(adaptive_kl=True, kl_coef=0.0)


# ---- the step not taken -----------------------------------------------------------------------


def off_policy(made: Any, data: Batch, *, ratio: float) -> Batch:
    """Old logprobs by which every ratio is `ratio`."""
    now = made.all_logprobs(data, temperature=1.0)
    shift = torch.tensor(ratio).log()
    return {**data, "behaviour_logprobs": [row - shift for row in now]}


@pytest.mark.parametrize("kind", [PolicyTrainer, PPOPolicyTrainer])
def test_a_batch_beyond_the_ratio_takes_no_step_and_is_filtered(tiny: Path, kind: Any) -> None:
    asked: Any = {"old_logprobs": "behaviour", "early_stop_ratio": 5.0, "truncation": "mask"}
    optimizer = OptimizerSettings(learning_rate=1e-3, schedule="cosine", total_steps=9)
    if kind is PolicyTrainer:
        made = PolicyTrainer(path=tiny, grpo=GRPOSettings(**asked), optimizer=optimizer)
        made.setup()
        data = episode()
    else:
        made, data = trainer(kind, tiny, ppo=asked, optimizer=optimizer), samples()
    size = len(data["reward"])
    before, rows = weights(made), size - data["finish_reason"].count("length")
    for ratio in (5.1, 1e30):
        metrics = train(made, off_policy(made, data, ratio=ratio))
        assert metrics["early_stopped"] == 1.0
        assert (metrics["rows_trained"], metrics["rows_filtered"]) == (0, size)
        assert "learning_rate" not in metrics
        assert made.lr_scheduler.num_steps == 0
        assert not made.optimizer.state
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name
    metrics = train(made, off_policy(made, data, ratio=4.9))
    assert (metrics["early_stopped"], metrics["ratio"]) == (0.0, pytest.approx(4.9, rel=1e-3))
    assert (metrics["rows_trained"], made.lr_scheduler.num_steps) == (rows, 1)


def test_a_ratio_beyond_all_numbers_stops_and_raises_nothing(tiny: Path) -> None:
    ppo = {"old_logprobs": "behaviour", "early_stop_ratio": 5.0}
    made = trainer(PPOPolicyTrainer, tiny, ppo=ppo)
    data = samples()
    data["behaviour_logprobs"] = [row - 1e4 for row in data["behaviour_logprobs"]]
    metrics = train(made, data)
    assert metrics["early_stopped"] == 1.0
    assert "loss" not in metrics  # it was infinite


def test_the_value_is_trained_whatever_the_ratio(tiny: Path) -> None:
    made = trainer(ValueTrainer, tiny, ppo={"early_stop_ratio": 1.5})
    data = samples()
    data["behaviour_logprobs"] = [row - 50 for row in data["behaviour_logprobs"]]
    assert train(made, data)["rows_trained"] == 15


RANK = """
import sys, torch
from pathlib import Path
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.settings import PPOSettings
from tests.models.test_ppo import samples, train, weights
from tests.models.test_ppo_control import off_policy
rank, file, tiny = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
ppo = PPOSettings(old_logprobs="behaviour", early_stop_ratio=5.0)
made = PPOPolicyTrainer(path=tiny, ppo=ppo, micro_batch_tokens=40)
made.attach(ModuleContext(rank=rank, world_size=2))
made.setup()
before = weights(made)
for odd, stops in ((4.0, 0.0), (9.5, 1.0)):
    data = off_policy(made, samples(), ratio=1.1)
    data["behaviour_logprobs"] = [
        row - torch.tensor(odd / 1.1).log() if i % 5 else row
        for i, row in enumerate(data["behaviour_logprobs"])
    ]
    metrics = train(made, data)
    assert metrics["early_stopped"] == stops, metrics
    same = all(torch.equal(before[n], w) for n, w in made.named_weights())
    assert same == bool(stops), (odd, same)
    made.load_weights(before.items())
torch.distributed.destroy_process_group()
"""


def test_all_ranks_stop_or_step_together(tiny: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet"), str(tiny)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
