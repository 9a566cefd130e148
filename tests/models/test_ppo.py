"""PPO's two trainers, against the formulas written out over plain passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_flows.data.batch import Batch, select
from rlhf_flows.errors import DataError, NonFiniteError
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.response_logprobs import padded_logprobs
from rlhf_flows.models.value_model import ValueModel
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.settings import OptimizerSettings, PPOSettings

PPOTrainer = PPOPolicyTrainer | ValueTrainer
KINDS: tuple[Callable[..., PPOTrainer], ...] = (PPOPolicyTrainer, ValueTrainer)


def trainer(
    kind: Callable[..., PPOTrainer], path: Path, *, ppo: dict[str, Any] | None = None, **more: Any
) -> Any:
    more.setdefault("optimizer", OptimizerSettings(learning_rate=1e-3))
    made = kind(path=path, ppo=PPOSettings(**(ppo or {})), **more)
    made.validate()
    made.setup()
    if isinstance(made, ValueTrainer):  # a head of zeros has no gradient to its body
        g = torch.Generator().manual_seed(5)
        made.model.score.weight.data.copy_(0.1 * torch.randn(1, 64, generator=g))
    return made


def samples(num_groups: int = 5, siblings: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    size = num_groups * siblings
    prompts = [torch.randint(3, 200, (2 + 3 * (i % 3),), generator=g) for i in range(num_groups)]
    lengths = torch.randint(1, 9, (size,), generator=g).tolist()
    return {
        "sample_id": [f"s{i}" for i in range(size)],
        "group": torch.arange(num_groups).repeat_interleave(siblings),
        "prompt_ids": [p for p in prompts for _ in range(siblings)],
        "response_ids": [torch.randint(3, 200, (n,), generator=g) for n in lengths],
        "reward": 4 * torch.rand(size, generator=g),
        "finish_reason": ["length" if i % 7 == 0 else "stop" for i in range(size)],
        "behaviour_logprobs": [-5 - torch.rand(n, generator=g) for n in lengths],
        "reference_logprobs": [-5 - torch.rand(n, generator=g) for n in lengths],
        "values": [torch.rand(n, generator=g) for n in lengths],
    }


def targets(data: Batch, *, kl_coef: float, gamma: float, lambda_: float) -> tuple[Any, Any]:
    """Advantages and returns, sample by sample, in plain Python."""
    advantages, returns = [], []
    for i in range(len(data["response_ids"])):
        policy, reference = data["behaviour_logprobs"][i], data["reference_logprobs"][i]
        rewards = (-kl_coef * (policy - reference)).tolist()
        rewards[-1] += float(data["reward"][i])
        values = [*data["values"][i].tolist(), 0.0]
        later, own = 0.0, []
        for t in reversed(range(len(rewards))):
            later = rewards[t] + gamma * values[t + 1] - values[t] + gamma * lambda_ * later
            own.insert(0, later)
        advantages.append(torch.tensor(own))
        returns.append(torch.tensor(own) + data["values"][i])
    return advantages, returns


def naive_policy_loss(made: PPOPolicyTrainer, data: Batch) -> Tensor:
    advantages, _ = targets(data, kl_coef=0.1, gamma=0.9, lambda_=0.8)
    a = torch.cat(advantages)
    a = (a - a.mean()) / a.std(correction=0)
    logp = padded_logprobs(made.model, data["prompt_ids"], data["response_ids"]).logprobs
    ratio = (logp - torch.cat(data["behaviour_logprobs"])).exp()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()


def naive_value_loss(made: ValueTrainer, data: Batch) -> Tensor:
    _, returns = targets(data, kl_coef=0.1, gamma=0.9, lambda_=0.8)
    losses = []
    for i, (prompt, response) in enumerate(
        zip(data["prompt_ids"], data["response_ids"], strict=True)
    ):
        ids = torch.cat([prompt, response])[None]
        hidden = made.model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
        value, old = made.model.score(hidden)[:, 0], data["values"][i]
        bounded = value.clamp(old - 0.2, old + 0.2)
        losses.append(torch.maximum((value - returns[i]) ** 2, (bounded - returns[i]) ** 2) / 2)
    return torch.cat(losses).mean()


def gradients(made: Any, loss: Tensor) -> dict[str, Tensor]:
    made.model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return found


def of_micro_batches(made: Any, data: Batch, ranks: int = 1) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one global batch, by the trainer's own cuts, of all its ranks."""
    made.model.zero_grad()
    total = 0.0
    for rank in range(ranks):
        made.attach(ModuleContext(rank=rank, world_size=ranks))
        for part in made.micro_batches(made.prepare_batch(data)):
            loss, _ = made._loss(part)
            loss.backward()
            total += float(loss.detach())
    made.attach(ModuleContext())
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return total, found


def train(made: Any, data: Batch) -> dict[str, float]:
    return dict(made.train_step(made.micro_batches(made.prepare_batch(data)), 0))


def weights(made: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.named_weights()}


WRITTEN_OUT = {"kl_coef": 0.1, "gamma": 0.9, "lambda_": 0.8, "old_logprobs": "behaviour"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_loss_and_gradient_are_those_of_the_papers_written_out(
    tiny: Path, kind: Any, layout: str
) -> None:
    made, data = trainer(kind, tiny, ppo=WRITTEN_OUT, layout=layout), samples()
    naive: Any = naive_policy_loss if kind is PPOPolicyTrainer else naive_value_loss
    loss = naive(made, data)
    expected = gradients(made, loss)
    got, found = of_micro_batches(made, data)
    assert got == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert train(made, data)["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_neither_the_cut_nor_the_ranks_change_loss_or_gradient(
    tiny: Path, kind: Any, aggregation: str
) -> None:
    ppo = {"aggregation": aggregation, "max_length": 8, "old_logprobs": "behaviour"}
    data = samples()
    first, expected = of_micro_batches(trainer(kind, tiny, ppo=ppo), data)
    for budget, ranks in ((40, 1), (1, 1), (40, 3)):
        made = trainer(kind, tiny, ppo=ppo, micro_batch_tokens=budget)
        loss, gradient = of_micro_batches(made, data, ranks)
        assert loss == pytest.approx(first, abs=1e-5)
        for name, want in expected.items():
            torch.testing.assert_close(gradient[name], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_trainer_goes_on_to_the_bit(tiny: Path, tmp_path: Path, kind: Any) -> None:
    settings = OptimizerSettings(learning_rate=1e-3, schedule="cosine", total_steps=6)
    first = trainer(kind, tiny, optimizer=settings)
    for seed in range(2):
        train(first, samples(seed=seed))
    first.save_state(tmp_path)
    saved = weights(first)
    expected = [train(first, samples(seed=seed)) for seed in (2, 3)]
    second = trainer(kind, tiny, optimizer=settings)
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert [train(second, samples(seed=seed)) for seed in (2, 3)] == expected
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


def test_old_logprobs_and_ratios_are_those_of_the_policy_trainer(tiny: Path) -> None:
    made, data = trainer(PPOPolicyTrainer, tiny), samples()
    prepared = [made.prepare_batch(select(data, range(k, k + 5))) for k in (0, 5)]
    assert made.wants_episode(2)
    ready = made.before_updates(prepared)
    found = [made.train_step(made.micro_batches(part), 0) for part in ready]
    assert found[0]["ratio"] == 1.0
    assert found[1]["ratio"] != 1.0


def test_what_a_batch_is_known_by(tiny: Path) -> None:
    data = samples()
    made = trainer(PPOPolicyTrainer, tiny, ppo={"score_clip": 2.0, "gamma": 0.9, "kl_coef": 0.1})
    prepared = made.prepare_batch(data)
    assert torch.equal(prepared["score"], data["reward"].clamp(max=2.0))
    scaled = trainer(
        PPOPolicyTrainer, tiny, ppo={"score_bias": 0.5, "score_scale": 3.0, "score_clip": 2.0}
    )
    expected = ((data["reward"] - 0.5) * 3).clamp(-2.0, 2.0)
    assert torch.equal(scaled.prepare_batch(data)["score"], expected)
    kl = [
        float((a - b).sum())
        for a, b in zip(data["behaviour_logprobs"], data["reference_logprobs"], strict=True)
    ]
    torch.testing.assert_close(prepared["sequence_kl"], torch.tensor(kl), atol=1e-5, rtol=1e-5)
    plain, returns = targets(data, kl_coef=0.1, gamma=0.9, lambda_=0.95)
    del plain
    unclipped = trainer(PPOPolicyTrainer, tiny, ppo={"gamma": 0.9, "kl_coef": 0.1})
    torch.testing.assert_close(
        unclipped.prepare_batch(data)["return"], torch.stack([r[0] for r in returns])
    )
    assert "kl" in train(made, data)


def test_advantages_are_whitened_over_the_trained_tokens_of_the_global_batch(tiny: Path) -> None:
    data = samples()
    for truncation in ("keep", "mask"):
        made = trainer(PPOPolicyTrainer, tiny, ppo={"truncation": truncation})
        prepared = made.prepare_batch(data)
        a, w = torch.cat(prepared["advantages"]), torch.cat(prepared["token_weight"])
        assert abs(float(a[w > 0].mean())) < 1e-5
        assert float(a[w > 0].std(correction=0)) == pytest.approx(1.0, abs=1e-4)
        assert not a[w == 0].any()
    raw = trainer(PPOPolicyTrainer, tiny, ppo={"whiten_advantages": False, "kl_coef": 0.1})
    expected, _ = targets(data, kl_coef=0.1, gamma=1.0, lambda_=0.95)
    got = raw.prepare_batch(data)["advantages"]
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_completions_are_counted_and_not_trained(tiny: Path, kind: Any) -> None:
    data = samples()
    metrics = train(trainer(kind, tiny, ppo={"truncation": "mask"}), data)
    cut_off = data["finish_reason"].count("length")
    assert (metrics["rows_trained"], metrics["rows_filtered"]) == (15 - cut_off, cut_off)


def test_training_raises_the_probability_of_what_turned_out_better(tiny: Path) -> None:
    made, data = trainer(PPOPolicyTrainer, tiny, ppo={"kl_coef": 0.0}), samples()
    del data["reference_logprobs"]
    data["behaviour_logprobs"] = made.all_logprobs(data, temperature=1.0)
    before = torch.cat(made.all_logprobs(data, temperature=1.0))
    for _ in range(5):
        train(made, data)
    moved = torch.cat(made.all_logprobs(data, temperature=1.0)) - before
    good = torch.cat(made.prepare_batch(data)["advantages"]) > 0
    assert moved[good].mean() > moved[~good].mean() + 0.05


def test_a_value_function_learns_the_returns(tiny: Path) -> None:
    made, data = trainer(ValueTrainer, tiny, ppo={"value_clip": None, "lambda_": 1.0}), samples()
    found = [train(made, data) for _ in range(40)]
    assert found[-1]["loss"] < 0.2 * found[0]["loss"]
    assert found[-1]["explained_variance"] > 0.8
    assert found[-1]["value"] == pytest.approx(found[-1]["return"], abs=0.3)
    # What it expects now, as its follower says it.
    value = ValueModel(path=tiny)
    value.setup()
    assert not torch.cat(value.forward_step(data)["values"]).any()  # a new head is zero
    value.load_weights(made.named_weights())
    values = value.forward_step(data)["values"]
    for got, want in zip(values, made.all_scores(data), strict=True):
        assert torch.equal(got, want)
    assert [len(v) for v in values] == [len(r) for r in data["response_ids"]]


@pytest.mark.parametrize("kind", KINDS)
def test_completions_cut_off_are_followed_by_what_is_expected_there(tiny: Path, kind: Any) -> None:
    data = samples()
    data["last_value"] = torch.rand(15, generator=torch.Generator().manual_seed(1)) + 1
    ppo = {"bootstrap_truncated": True, "kl_coef": 0.1, "gamma": 0.9, "lambda_": 0.8}
    # What is expected at the end counts like a reward at the last token, a step later.
    ends = torch.tensor([float(r == "length") for r in data["finish_reason"]]) * data["last_value"]
    expected = targets(
        {**data, "reward": data["reward"] + 0.9 * ends}, kl_coef=0.1, gamma=0.9, lambda_=0.8
    )
    made = trainer(kind, tiny, ppo={**ppo, "whiten_advantages": False})
    prepared = made.prepare_batch(data)
    name, of = ("advantages", 0) if kind is PPOPolicyTrainer else ("returns", 1)
    torch.testing.assert_close(
        torch.cat(prepared[name]), torch.cat(expected[of]), atol=1e-5, rtol=1e-5
    )
    makers = {"last_value": "the value model with the same ppo", "finish_reason": "the policy"}
    for missing, maker in makers.items():
        lacking = {k: v for k, v in data.items() if k != missing}
        with pytest.raises(DataError, match=f"needs the column '{missing}'.*call {maker}"):
            made.prepare_batch(lacking)


@pytest.mark.parametrize("value_norm", ["none", "exp"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_the_value_at_the_end_is_that_before_a_token_more(
    tiny: Path, value_norm: str, layout: Any
) -> None:
    ppo = PPOSettings(bootstrap_truncated=True, value_norm=value_norm)
    made, data = trainer(ValueTrainer, tiny, ppo=ppo.model_dump()), samples()
    data["last_value"] = torch.zeros(15)
    train(made, data)
    value = ValueModel(path=tiny, ppo=ppo, layout=layout, micro_batch_tokens=40)
    value.setup()
    value.load_weights(made.named_weights())
    found = value.forward_step(data)
    ids = torch.cat([data["prompt_ids"][4], data["response_ids"][4]])[None]
    scores = made.model.score(made.model.model(ids).last_hidden_state)[0, :, 0].detach()
    if made.moments is not None:
        scores = scores * made.moments.std.float() + made.moments.mean.float()
    expected = scores[len(data["prompt_ids"][4]) - 1 :]
    torch.testing.assert_close(found["values"][4], expected[:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["last_value"][4], expected[-1], atol=1e-5, rtol=1e-5)
    plain = ValueModel(path=tiny)
    plain.setup()
    assert set(plain.forward_step(data)) - set(data) == set()


def test_values_that_moved_too_far_are_clipped(tiny: Path) -> None:
    made, data = trainer(ValueTrainer, tiny, ppo={"value_clip": 0.01}), samples()
    data["values"] = made.all_scores(data)
    assert train(made, data)["clip_fraction"] == 0.0
    for _ in range(3):
        metrics = train(made, data)
    assert metrics["clip_fraction"] > 0.5


def test_a_trained_value_model_is_a_folder_that_others_load(tiny: Path, tmp_path: Path) -> None:
    made, data = trainer(ValueTrainer, tiny), samples()
    train(made, data)
    made.save_pretrained(tmp_path)
    theirs = dict(AutoModelForSequenceClassification.from_pretrained(tmp_path).named_parameters())
    for name, tensor in made.named_weights():
        assert torch.equal(theirs[name], tensor), name
    again = ValueModel(path=tmp_path)
    again.validate()
    again.setup()
    got = again.forward_step(data)["values"]
    torch.testing.assert_close(torch.cat(got), torch.cat(made.all_scores(data)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("response_ids", "the policy"),
        ("behaviour_logprobs", "the policy"),
        ("reference_logprobs", r"the reference \(Reference\)"),
        ("values", r"the value model \(ValueModel\)"),
        ("reward", r"the reward model \(RewardModel\)"),
    ],
)
def test_a_missing_column_is_refused_with_the_module_that_makes_it(
    tiny: Path, kind: Any, name: str, maker: str
) -> None:
    data = samples()
    del data[name]
    with pytest.raises(DataError, match=f"needs the column '{name}'.*call {maker}"):
        kind(path=tiny).prepare_batch(data)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_cannot_be_are_refused_by_row(tiny: Path, kind: Any) -> None:
    data = samples()
    data["values"][2] = torch.zeros(20)
    with pytest.raises(DataError, match=r"row 2 has \d response tokens but 20 values in 'values'"):
        kind(path=tiny).prepare_batch(data)
    data = samples()
    data["reward"][4] = float("nan")
    with pytest.raises(DataError, match="the score of row 4 is nan"):
        kind(path=tiny).prepare_batch(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_leaves_the_weights(tiny: Path, kind: Any) -> None:
    made, data = trainer(kind, tiny), samples()
    before = weights(made)
    prepared = made.prepare_batch(data)
    prepared["token_weight"][3][0] = float("inf")
    with pytest.raises(NonFiniteError, match="weights were left"):
        made.train_step(made.micro_batches(prepared), 0)
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name
