"""Value models that learn normalized returns: the column `values` is on the scale of returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError, SyncError
from rlhf_flows.models.value_model import ValueModel
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.settings import OptimizerSettings, PPOSettings
from tests.models.test_ppo import samples, targets, train, trainer, weights

KINDS = ("exp", "ma")


def far(data: Batch) -> Batch:
    """The same samples, with rewards and old values around 1000."""
    data["reward"] = 1000 + 300 * data["reward"]
    data["values"] = [1000 + 300 * v for v in data["values"]]
    return data


def settings(kind: str, **more: Any) -> dict[str, Any]:
    return {"value_norm": kind, "kl_coef": 0.1, "gamma": 0.9, "lambda_": 0.8, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_the_statistics_are_those_of_all_returns_of_every_batch(tiny: Path, kind: str) -> None:
    made = trainer(ValueTrainer, tiny, ppo=settings(kind, value_norm_beta=0.7))
    batches = [far(samples(seed=seed)) for seed in range(3)]
    returns = []
    for data in batches:
        train(made, data)
        returns.append(torch.cat(targets(data, kl_coef=0.1, gamma=0.9, lambda_=0.8)[1]).double())
    if kind == "ma":
        mean, square = torch.cat(returns).mean(), (torch.cat(returns) ** 2).mean()
    else:
        share = torch.tensor([0.3 * 0.7**2, 0.3 * 0.7, 0.3], dtype=torch.float64)
        share = share / share.sum()
        mean = sum(w * r.mean() for w, r in zip(share, returns, strict=True))
        square = sum(w * (r**2).mean() for w, r in zip(share, returns, strict=True))
    assert float(made.moments.mean) == pytest.approx(float(mean), rel=1e-6)
    assert float(made.moments.std) == pytest.approx(float((square - mean**2).sqrt()), rel=1e-4)


def test_the_loss_is_that_of_normalized_values_written_out(tiny: Path) -> None:
    made, data = trainer(ValueTrainer, tiny, ppo=settings("ma")), far(samples())
    outputs = made.all_scores(data)
    data["normalized_values"] = [o - 0.3 for o in outputs]  # so that some are clipped
    returns = torch.cat(targets(data, kl_coef=0.1, gamma=0.9, lambda_=0.8)[1]).double()
    target = (returns - returns.mean()) / (returns.std(correction=0) ** 2 + 1e-5).sqrt()
    now, old = torch.cat(outputs).double(), torch.cat(data["normalized_values"]).double()
    bounded = torch.maximum(torch.minimum(now, old + 0.2), old - 0.2)
    expected = float((torch.maximum((now - target) ** 2, (bounded - target) ** 2) / 2).mean())
    metrics = train(made, data)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    # What it is known by is on the scale of returns.
    assert metrics["return"] == pytest.approx(float(returns.mean()), rel=1e-5)
    values = now * returns.std(correction=0) + returns.mean()
    assert metrics["value"] == pytest.approx(float(values.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_far_scale_is_learnt_that_a_plain_head_does_not_reach(tiny: Path, kind: str) -> None:
    def learnt(value_norm: str) -> float:
        ppo = settings(value_norm, value_clip=None, lambda_=1.0, gamma=1.0)
        made, data = trainer(ValueTrainer, tiny, ppo=ppo), far(samples())
        found = [train(made, data) for _ in range(40)]
        assert (value_norm == "none") == ("return_std" not in found[-1])
        return found[-1]["explained_variance"]

    assert learnt(kind) > 0.8
    assert learnt("none") < 0.2


def test_each_version_gives_values_by_its_own_statistics(tiny: Path, tmp_path: Path) -> None:
    """By param sync, from a folder, and at any staleness."""
    ppo = PPOSettings(**settings("exp", value_norm_beta=0.5))
    made = trainer(ValueTrainer, tiny, ppo=settings("exp", value_norm_beta=0.5))
    follower = ValueModel(path=tiny, ppo=ppo)
    follower.setup()
    data = samples()
    del data["values"]
    before = follower.forward_step(data)
    for name in ("values", "normalized_values"):
        assert not torch.cat(before[name]).any()  # no statistics yet, and a head of zeros
    expected, exported = [], []
    for version in range(1, 4):
        train(made, far(samples(seed=version)))
        exported.append(weights(made))
        scores = torch.cat(made.all_scores(data)).double()
        expected.append((scores * made.moments.std + made.moments.mean).float())
        (tmp_path / str(version)).mkdir()
        made.save_pretrained(tmp_path / str(version))
    for version in (3, 1, 2):
        follower.load_weights(exported[version - 1].items())
        got = follower.forward_step(data)
        assert torch.equal(torch.cat(got["values"]), expected[version - 1])
        cold = ValueModel(path=tmp_path / str(version))
        cold.validate()
        cold.setup()
        found = cold.forward_step(data)
        assert torch.equal(torch.cat(found["values"]), expected[version - 1])
        assert "normalized_values" not in found  # nobody said that it is wanted
    assert len({digest_weights(w.items()) for w in exported}) == 3


def test_statistics_are_part_of_what_is_digested(tiny: Path) -> None:
    made = trainer(ValueTrainer, tiny, ppo=settings("ma"))
    before = digest_weights(made.named_weights())
    made.moments.update(torch.tensor([5.0, 7.0]))
    assert digest_weights(made.named_weights()) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_trainer_normalizes_on_to_the_bit(tiny: Path, tmp_path: Path, kind: str) -> None:
    first = trainer(ValueTrainer, tiny, ppo=settings(kind))
    for seed in range(2):
        train(first, far(samples(seed=seed)))
    first.save_state(tmp_path)
    saved = weights(first)
    expected = [train(first, far(samples(seed=seed))) for seed in (2, 3)]
    second = trainer(ValueTrainer, tiny, ppo=settings(kind))
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert [train(second, far(samples(seed=seed))) for seed in (2, 3)] == expected
    assert digest_weights(second.named_weights()) == digest_weights(first.named_weights())


def test_every_rank_has_the_statistics_of_the_whole_batch(tiny: Path) -> None:
    alone = trainer(ValueTrainer, tiny, ppo=settings("exp"))
    alone.prepare_batch(far(samples()))
    for rank in range(2):
        made = ValueTrainer(path=tiny, ppo=PPOSettings(**settings("exp")))
        made.attach(ModuleContext(rank=rank, world_size=2))
        made.prepare_batch(far(samples()))
        assert torch.equal(made.moments.mean, alone.moments.mean)
        assert torch.equal(made.moments.std, alone.moments.std)


RANK = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.settings import OptimizerSettings, PPOSettings
from tests.models.test_ppo import samples, train
from tests.models.test_value_norm import far, settings
rank, file, tiny, alone = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), load_file(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
made = ValueTrainer(
    path=tiny, ppo=PPOSettings(**settings("exp", adaptive_kl=True)), micro_batch_tokens=40,
    optimizer=OptimizerSettings(learning_rate=1e-3),
)
made.attach(ModuleContext(rank=rank, world_size=2))
made.setup()
for seed in range(3):
    made.before_episode(seed)
    train(made, far(samples(seed=seed)))
    made.after_episode(seed)
for name, tensor in made.named_weights():
    torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=1e-4, msg=name)
    if name.startswith("value_norm"):
        assert torch.equal(tensor, alone[name]), name
assert made.kl_controller.coef == float(alone["coef"])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tiny: Path, tmp_path: Path) -> None:
    ppo = PPOSettings(**settings("exp", adaptive_kl=True))
    alone = ValueTrainer(path=tiny, ppo=ppo, optimizer=OptimizerSettings(learning_rate=1e-3))
    alone.setup()
    for seed in range(3):
        alone.before_episode(seed)
        train(alone, far(samples(seed=seed)))
        alone.after_episode(seed)
    coef = torch.tensor([alone.kl_controller.coef], dtype=torch.float64)
    save_file({**weights(alone), "coef": coef}, tmp_path / "alone")
    arguments = [str(tmp_path / "meet"), str(tiny), str(tmp_path / "alone")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_masked_completions_are_not_in_the_statistics(tiny: Path) -> None:
    data = far(samples())
    for i, reason in enumerate(data["finish_reason"]):
        if reason == "length":
            data["reward"][i] = 1e6
    made = trainer(ValueTrainer, tiny, ppo=settings("ma", truncation="mask"))
    made.prepare_batch(data)
    assert float(made.moments.mean) < 5000


def test_a_folder_with_a_scale_loads_elsewhere_and_trains_on(tiny: Path, tmp_path: Path) -> None:
    made = trainer(ValueTrainer, tiny, ppo=settings("ma"))
    train(made, far(samples()))
    made.save_pretrained(tmp_path)
    theirs = dict(AutoModelForSequenceClassification.from_pretrained(tmp_path).named_parameters())
    assert torch.equal(theirs["score.weight"], made.model.score.weight)
    again = ValueTrainer(path=tmp_path, ppo=PPOSettings(**settings("ma")))
    again.validate()
    again.setup()
    assert digest_weights(again.named_weights()) == digest_weights(made.named_weights())
    for other in ("none", "exp"):
        wrong = ValueTrainer(path=tmp_path, ppo=PPOSettings(**settings(other)))
        with pytest.raises(ConfigError, match=f"value_norm='ma', and .* value_norm='{other}'"):
            wrong.validate()


def test_weights_without_statistics_are_refused_by_a_trainer_that_needs_them(tiny: Path) -> None:
    made = trainer(ValueTrainer, tiny, ppo=settings("ma"))
    with pytest.raises(SyncError, match=r"value_norm\.mean is missing"):
        made.load_weights(trainer(ValueTrainer, tiny).named_weights())
