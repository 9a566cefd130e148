from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch, select
from rlhf_flows.errors import ConfigError, DataError, NonFiniteError
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.models.response_logprobs import padded_logprobs
from rlhf_flows.settings import GRPOSettings, OptimizerSettings


def trainer(path: Path, *, grpo: dict[str, Any] | None = None, **options: Any) -> PolicyTrainer:
    options.setdefault("optimizer", OptimizerSettings(learning_rate=1e-3))
    made = PolicyTrainer(path=path, grpo=GRPOSettings(**(grpo or {})), **options)
    made.validate()
    made.setup()
    return made


def episode(num_groups: int = 5, siblings: int = 4, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    size = num_groups * siblings
    prompts = [torch.randint(3, 200, (2 + 3 * (i % 3),), generator=g) for i in range(num_groups)]
    lengths = torch.randint(1, 9, (size,), generator=g).tolist()
    responses = [torch.randint(3, 200, (n,), generator=g) for n in lengths]
    return {
        "sample_id": [f"s{i}" for i in range(size)],
        "group": torch.arange(num_groups).repeat_interleave(siblings),
        "prompt_ids": [p for p in prompts for _ in range(siblings)],
        "response_ids": responses,
        "reward": torch.rand(size, generator=g),
        "finish_reason": ["length" if i % 7 == 0 else "stop" for i in range(size)],
        "behaviour_logprobs": [-4 - torch.rand(n, generator=g) for n in lengths],
        "reference_logprobs": [-4 - torch.rand(n, generator=g) for n in lengths],
    }


def gradients(made: PolicyTrainer, data: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one global batch, by the trainer's own micro-batches."""
    made.model.zero_grad()
    total = 0.0
    for micro_batch in made.micro_batches(made.prepare_batch(data)):
        if any(made._has_gradient(micro_batch)):
            loss, _ = made._loss(micro_batch)
            loss.backward()
            total += float(loss.detach())
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return total, found


def weights(made: PolicyTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.named_weights()}


def train(made: PolicyTrainer, data: Batch) -> dict[str, float]:
    return dict(made.train_step(made.micro_batches(made.prepare_batch(data)), 0))


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(
    tiny: Path, aggregation: str
) -> None:
    grpo = {"aggregation": aggregation, "max_length": 8, "kl_coef": 0.1, "importance": "sequence"}
    data = episode()
    found = [
        gradients(trainer(tiny, grpo=grpo, micro_batch_tokens=budget), data)
        for budget in (10_000, 60, 1)
    ]
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        for name, expected in found[0][1].items():
            torch.testing.assert_close(gradient[name], expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_the_paper_written_out(tiny: Path) -> None:
    grpo = {"aggregation": "sequence", "kl_coef": 0.1, "old_logprobs": "behaviour"}
    made, data = trainer(tiny, grpo=grpo), episode()
    flat = padded_logprobs(made.model, data["prompt_ids"], data["response_ids"]).logprobs
    losses = []
    for i, logp in enumerate(flat.split([len(r) for r in data["response_ids"]])):
        own = data["reward"][data["group"] == data["group"][i]]
        advantage = (data["reward"][i] - own.mean()) / (own.std() + 1e-4)
        ratio = (logp - data["behaviour_logprobs"][i]).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        d = data["reference_logprobs"][i] - logp
        losses.append((-gain + 0.1 * (d.exp() - d - 1)).mean())
    expected = float(torch.stack(losses).mean().detach())
    assert gradients(made, data)[0] == pytest.approx(expected, rel=1e-4)
    assert train(made, data)["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_shared_prompt_and_a_padded_row_train_alike(tiny: Path) -> None:
    shared = gradients(trainer(tiny), episode())[1]
    padded = gradients(trainer(tiny, layout="padded"), episode())[1]
    for name, gradient in shared.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-5, rtol=1e-4)


def test_training_raises_the_probability_of_what_was_rewarded(tiny: Path) -> None:
    made, data = trainer(tiny), episode()
    before = torch.stack([x.mean() for x in made.all_logprobs(data, temperature=1.0)])
    for _ in range(5):
        train(made, data)
    after = torch.stack([x.mean() for x in made.all_logprobs(data, temperature=1.0)])
    good = made.prepare_batch(data)["advantage"] > 0
    assert (after - before)[good].mean() > (after - before)[~good].mean() + 0.05


def test_the_same_batch_gives_the_same_bits(tiny: Path) -> None:
    first, second = trainer(tiny), trainer(tiny)
    for seed in range(3):
        metrics = [train(made, episode(seed=seed)) for made in (first, second)]
        assert metrics[0] == metrics[1]
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_resumed_trainer_goes_on_to_the_bit(
    tiny: Path, tmp_path: Path, dtype: Any, master_weights: bool
) -> None:
    settings = OptimizerSettings(
        learning_rate=1e-3, schedule="cosine", total_steps=6, warmup_steps=2,
        master_weights=master_weights,
    )  # fmt: skip
    first = trainer(tiny, optimizer=settings, dtype=dtype)
    for seed in range(2):
        train(first, episode(seed=seed))
    first.save_state(tmp_path)
    saved = weights(first)
    draws = torch.rand(3)
    expected = [train(first, episode(seed=seed)) for seed in (2, 3)]

    second = trainer(tiny, optimizer=settings, dtype=dtype)
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert torch.equal(torch.rand(3), draws)
    assert [train(second, episode(seed=seed)) for seed in (2, 3)] == expected
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


def test_master_weights_keep_updates_that_bfloat16_rounds_away(tiny: Path) -> None:
    moved = {}
    for master_weights in (False, True):
        settings = OptimizerSettings(learning_rate=2e-6, master_weights=master_weights)
        made = trainer(tiny, optimizer=settings, dtype="bfloat16")
        start = weights(made)
        for seed in range(40):
            train(made, episode(seed=seed % 2))
        moved[master_weights] = sum(
            int((start[name] != now).sum()) for name, now in made.named_weights() if now.ndim == 2
        )
    assert moved[True] > 2 * moved[False]


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_weights(tiny: Path) -> None:
    made, data = trainer(tiny, grpo={"kl_coef": 0.1}), episode()
    before = weights(made)
    data["reference_logprobs"][3][0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"gradient norm of .*nan.*weights were left"):
        train(made, data)
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name
    assert train(made, episode())["grad_norm"] > 0


def test_groups_without_a_lesson_cost_no_pass_and_are_counted(tiny: Path) -> None:
    made, data = trainer(tiny), episode()
    expected = gradients(trainer(tiny, grpo={"kl_coef": 1e-12}), {**data, "reward": mix(data)})[1]
    data["reward"] = mix(data)
    parts = made.micro_batches(made.prepare_batch(data))
    assert sorted(i for part in parts for i in part["sample_id"]) == sorted(data["sample_id"])
    metrics = made.train_step(parts, 0)
    assert (metrics["rows_trained"], metrics["rows_filtered"]) == (12, 8)
    for name, gradient in gradients(trainer(tiny), data)[1].items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def mix(data: Batch) -> Tensor:
    """Rewards whose first two groups are all alike."""
    return torch.where(data["group"] < 2, 0.25, data["reward"])


def test_a_batch_without_any_lesson_changes_nothing(tiny: Path) -> None:
    made, data = trainer(tiny), episode()
    before = weights(made)
    data["reward"] = torch.ones(20)
    metrics = train(made, data)
    assert (metrics["rows_trained"], metrics["rows_filtered"]) == (0, 20)
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name


def test_masked_completions_leave_the_loss_and_stay_in_the_baseline(tiny: Path) -> None:
    made, data = trainer(tiny, grpo={"truncation": "mask"}), episode()
    prepared = made.prepare_batch(data)
    assert torch.equal(prepared["advantage"], trainer(tiny).prepare_batch(data)["advantage"])
    for reason, weight in zip(data["finish_reason"], prepared["token_weight"], strict=True):
        assert bool(weight.any()) == (reason == "stop")
    assert train(made, data)["rows_filtered"] == data["finish_reason"].count("length")


def test_penalized_completions_lose_reward(tiny: Path) -> None:
    grpo = {"truncation": "penalize", "truncation_penalty": 0.5, "advantage_normalization": "none"}
    data = episode()
    lowered = data["reward"] - torch.tensor([0.5 * (r == "length") for r in data["finish_reason"]])
    expected = trainer(tiny, grpo={"advantage_normalization": "none"}).prepare_batch(
        {**data, "reward": lowered}
    )
    got = trainer(tiny, grpo=grpo).prepare_batch(data)
    assert torch.equal(got["advantage"], expected["advantage"])


def test_old_logprobs_are_computed_once_and_only_where_they_differ(tiny: Path) -> None:
    made, data = trainer(tiny), episode()
    assert not made.wants_episode(1)
    assert made.wants_episode(2)
    assert not trainer(tiny, grpo={"old_logprobs": "behaviour"}).wants_episode(2)
    first, second = select(data, range(8)), select(data, range(8, 20))
    prepared = [made.prepare_batch(part) for part in (first, second, second)]
    ready = made.before_updates(prepared)
    assert "old_logprobs" not in ready[0]
    expected = made.all_logprobs(second, temperature=1.0)
    for part in ready[1:]:
        for got, want in zip(part["old_logprobs"], expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert ready[2]["old_logprobs"][0] is ready[1]["old_logprobs"][0]
    ratios = [made.train_step(made.micro_batches(part), 0)["ratio"] for part in ready]
    assert ratios[0] == 1.0
    assert ratios[1] != 1.0


def test_the_gap_between_sampler_and_trainer_is_measured(tiny: Path) -> None:
    made, data = trainer(tiny), episode()
    exact = made.all_logprobs(data, temperature=1.0)
    data["behaviour_logprobs"] = exact
    assert train(trainer(tiny), data)["logprob_gap_max"] < 1e-5
    data["behaviour_logprobs"] = [x.clone() for x in exact]
    data["behaviour_logprobs"][5][0] += 1.0
    metrics = train(made, data)
    assert metrics["logprob_gap_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["logprob_gap"] == pytest.approx(1.0 / metrics["tokens"], rel=0.01)


def test_exact_entropy_and_its_estimate_agree_on_what_is_near_uniform(tiny: Path) -> None:
    exact = train(trainer(tiny, grpo={"exact_entropy": True}), episode())["entropy"]
    assert exact == pytest.approx(train(trainer(tiny), episode())["entropy"], rel=0.05)


def test_ranks_share_a_global_batch_row_by_row(tiny: Path) -> None:
    from rlhf_flows.modules.base import ModuleContext

    seen: list[str] = []
    for rank in range(3):
        made = PolicyTrainer(path=tiny, micro_batch_tokens=40)
        made.attach(ModuleContext(rank=rank, world_size=3))
        parts = made.micro_batches(made.prepare_batch(episode()))
        seen += [i for part in parts for i in part["sample_id"]]
    assert sorted(seen) == sorted(episode()["sample_id"])


def test_the_reference_of_the_same_weights_has_no_divergence(tiny: Path) -> None:
    reference = Reference(path=tiny, temperature=0.7, micro_batch_tokens=50)
    reference.validate()
    reference.setup()
    data = reference.forward_step(episode())
    lengths = [len(r) for r in data["response_ids"]]
    assert [len(r) for r in data["reference_logprobs"]] == lengths
    made = trainer(tiny, grpo={"kl_coef": 0.1, "temperature": 0.7})
    assert abs(train(made, data)["kl"]) < 1e-8


@pytest.mark.parametrize(
    ("change", "grpo", "message"),
    [
        ({"reward": None}, {}, "needs the column 'reward'"),
        ({"reference_logprobs": None}, {"kl_coef": 0.1}, "needs the column 'reference_logprobs'"),
        ({"finish_reason": None}, {"truncation": "mask"}, "needs the column 'finish_reason'"),
        (
            {"behaviour_logprobs": [torch.zeros(1)] * 20},
            {"importance": "token"},
            r"row \d+ has \d response tokens but 1 values in 'behaviour_logprobs'",
        ),
    ],
)
def test_a_batch_that_lacks_what_the_algorithm_needs_is_refused(
    tiny: Path, change: dict[str, Any], grpo: dict[str, Any], message: str
) -> None:
    data = {k: v for k, v in {**episode(), **change}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        trainer(tiny, grpo=grpo).prepare_batch(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype of module 'trainer' is 'float16', expected one of float32"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens of module 'trainer' is 0"),
        ({"layout": "flex"}, "layout of module 'trainer' is 'flex', expected one of auto"),
        ({"path": "/nowhere/model"}, "no model folder at '/nowhere/model'"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    tiny: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyTrainer(**{"path": tiny, **options}).validate()
