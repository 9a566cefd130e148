"""Trainers on pairs: the reward model's, DPO's, online DPO's, against plain passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_flows.data import collate, select
from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import DataError, NonFiniteError
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.online_dpo_trainer import OnlineDPOTrainer
from rlhf_flows.models.preference_reference import PreferenceReference
from rlhf_flows.models.response_logprobs import padded_logprobs
from rlhf_flows.models.reward_model import RewardModel
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.settings import DPOSettings, OptimizerSettings, RewardModelSettings

KINDS = (RewardTrainer, DPOTrainer, OnlineDPOTrainer)


def trainer(kind: Any, path: Path, **options: Any) -> Any:
    options.setdefault("optimizer", OptimizerSettings(learning_rate=1e-3))
    return ready(kind(path=path, **options))


def ready(made: Any) -> Any:
    made.validate()
    made.setup()
    return made


def pairs(size: int = 9, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def texts() -> list[Tensor]:
        lengths = torch.randint(1, 8, (size,), generator=g).tolist()
        return [torch.randint(3, 200, (n,), generator=g) for n in lengths]

    return {
        "sample_id": [f"s{i}" for i in range(size)],
        "group": torch.arange(size),
        "prompt_ids": texts(),
        "chosen_ids": texts(),
        "rejected_ids": texts(),
        "margin": torch.rand(size, generator=g, dtype=torch.float64),
        "reference_chosen_logprob": -20 * torch.rand(size, generator=g),
        "reference_rejected_logprob": -20 * torch.rand(size, generator=g),
    }


def groups(num_groups: int = 4, siblings: int = 3, seed: int = 0) -> Batch:
    """Samples; the rewards of group 1 are all the same."""
    g = torch.Generator().manual_seed(seed)
    size = num_groups * siblings
    prompts = [torch.randint(3, 200, (3 + i,), generator=g) for i in range(num_groups)]
    lengths = torch.randint(1, 8, (size,), generator=g).tolist()
    group = torch.arange(num_groups).repeat_interleave(siblings)
    return {
        "group": group,
        "prompt_ids": [p for p in prompts for _ in range(siblings)],
        "response_ids": [torch.randint(3, 200, (n,), generator=g) for n in lengths],
        "reward": torch.where(group == 1, 0.5, torch.rand(size, generator=g)),
        "reference_logprobs": [-5 - torch.rand(n, generator=g) for n in lengths],
    }


def data_for(kind: Any, seed: int = 0) -> Batch:
    return groups(seed=seed) if kind is OnlineDPOTrainer else pairs(seed=seed)


def of_micro_batches(made: Any, data: Batch, ranks: int = 1) -> tuple[float, dict[str, Tensor]]:
    made.model.zero_grad()
    total = 0.0
    for rank in range(ranks):
        made.attach(ModuleContext(rank=rank, world_size=ranks))
        for part in made.micro_batches(made.prepare_batch(data)):
            if "chosen_ids" in part:
                loss, _ = made._loss(part)
                loss.backward()
                total += float(loss.detach())
    made.attach(ModuleContext())
    found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    return total, found


def reward_of(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    return model.score(model.model(torch.cat([prompt, response])[None]).last_hidden_state)[0, -1, 0]


def naive_rewards(made: Any, data: Batch) -> Tensor:
    losses = []
    for i, prompt in enumerate(data["prompt_ids"]):
        chosen = reward_of(made.model, prompt, data["chosen_ids"][i])
        rejected = reward_of(made.model, prompt, data["rejected_ids"][i])
        likelihood = torch.sigmoid(chosen - rejected - data["margin"][i].float()).log()
        losses.append(-likelihood + 0.01 * (chosen + rejected) ** 2)
    return torch.stack(losses).mean()


def logp_of(made: Any, prompt: Tensor, response: Tensor) -> Tensor:
    return padded_logprobs(made.model, [prompt], [response]).logprobs.sum()


def naive_dpo(made: Any, data: Batch) -> Tensor:
    losses = []
    for i, prompt in enumerate(data["prompt_ids"]):
        chosen = logp_of(made, prompt, data["chosen_ids"][i])
        better = chosen - data["reference_chosen_logprob"][i]
        worse = (
            logp_of(made, prompt, data["rejected_ids"][i]) - data["reference_rejected_logprob"][i]
        )
        dpo = -torch.sigmoid(0.2 * (better - worse)).log()
        losses.append(dpo - 0.3 * chosen / len(data["chosen_ids"][i]))
    return torch.stack(losses).mean()


def naive_online_dpo(made: Any, data: Batch) -> Tensor:
    losses = []
    for group in (0, 2, 3):
        rows = (data["group"] == group).nonzero()[:, 0].tolist()
        best = max(rows, key=lambda i: data["reward"][i])
        worst = min(rows, key=lambda i: data["reward"][i])
        better, worse = (
            logp_of(made, data["prompt_ids"][i], data["response_ids"][i])
            - data["reference_logprobs"][i].sum()
            for i in (best, worst)
        )
        losses.append(-torch.sigmoid(0.2 * (better - worse)).log())
    return torch.stack(losses).mean()


NAIVE = {
    RewardTrainer: (
        naive_rewards,
        {"settings": RewardModelSettings(use_margin=True, center_coef=0.01)},
    ),
    DPOTrainer: (naive_dpo, {"dpo": DPOSettings(beta=0.2, sft_coef=0.3)}),
    OnlineDPOTrainer: (naive_online_dpo, {"dpo": DPOSettings(beta=0.2)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_loss_and_gradient_are_those_of_the_papers_written_out(
    tiny: Path, kind: Any, layout: str
) -> None:
    naive, settings = NAIVE[kind]
    made, data = trainer(kind, tiny, layout=layout, **settings), data_for(kind)
    loss = naive(made, data)
    made.model.zero_grad()
    loss.backward()
    expected = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    got, found = of_micro_batches(made, data)
    assert got == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_cut_nor_the_ranks_change_loss_or_gradient(tiny: Path, kind: Any) -> None:
    data = data_for(kind)
    first, expected = of_micro_batches(trainer(kind, tiny), data)
    for budget, ranks in ((30, 1), (1, 1), (30, 3)):
        loss, gradient = of_micro_batches(
            trainer(kind, tiny, micro_batch_tokens=budget), data, ranks
        )
        assert loss == pytest.approx(first, abs=1e-5)
        for name, want in expected.items():
            torch.testing.assert_close(gradient[name], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_trainer_goes_on_to_the_bit(tiny: Path, tmp_path: Path, kind: Any) -> None:
    def train(made: Any, seed: int) -> dict[str, float]:
        prepared = made.prepare_batch(data_for(kind, seed))
        return dict(made.train_step(made.micro_batches(prepared), 0))

    settings = OptimizerSettings(learning_rate=1e-3, schedule="linear", total_steps=6)
    first = trainer(kind, tiny, optimizer=settings)
    for seed in range(2):
        train(first, seed)
    first.save_state(tmp_path)
    saved = {name: tensor.clone() for name, tensor in first.named_weights()}
    expected = [train(first, seed) for seed in (2, 3)]
    second = trainer(kind, tiny, optimizer=settings)
    second.load_weights(saved.items())
    second.load_state(tmp_path)
    assert [train(second, seed) for seed in (2, 3)] == expected
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_are_learnt(tiny: Path, kind: Any) -> None:
    made, data = trainer(kind, tiny), data_for(kind)
    if kind is OnlineDPOTrainer:
        data["reference_logprobs"] = made.all_logprobs(data, temperature=1.0)
    elif kind is DPOTrainer:
        data = ready(PreferenceReference(path=tiny)).forward_step(data)
    found = []
    for step in range(15):
        found.append(made.train_step(made.micro_batches(made.prepare_batch(data)), step))
    assert found[-1]["accuracy"] == 1.0
    assert found[-1]["margin"] > found[0]["margin"] + 0.3
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    if kind is not RewardTrainer:
        assert found[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_a_reference_gives_the_logprob_of_whole_completions(tiny: Path) -> None:
    reference = ready(PreferenceReference(path=tiny, micro_batch_tokens=20))
    data = reference.forward_step(pairs())
    for name in ("chosen", "rejected"):
        expected = [
            logp_of(reference, p, r)
            for p, r in zip(data["prompt_ids"], data[f"{name}_ids"], strict=True)
        ]
        got = data[f"reference_{name}_logprob"]
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-5)
        assert got.dtype == torch.float32


ROWS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(0, 30, 3)]


@pytest.mark.parametrize("kind", [RewardTrainer, RewardModel, PreferenceReference])
def test_rows_become_batches_that_the_module_takes(tiny: Path, kind: Any) -> None:
    made = kind(path=tiny)
    made.validate_rows(ROWS)
    assert made.tokenizer is None
    dataset = made.build_dataset(ROWS)
    found = ready(made).forward_step(collate([dataset[i] for i in range(len(ROWS))]))
    assert len(found["prompt"]) == len(ROWS)
    with pytest.raises(DataError, match="pair 0 needs a text under 'rejected'"):
        made.validate_rows([{"prompt": "a", "chosen": "b"}])


def test_a_reward_model_is_evaluated_by_how_often_it_is_right(tiny: Path) -> None:
    made, data = trainer(RewardTrainer, tiny), pairs()
    for step in range(15):
        made.train_step(made.micro_batches(made.prepare_batch(data)), step)
    follower = ready(RewardModel(path=tiny))
    assert float(follower.eval_step(data)["accuracy"].mean()) < 1.0
    follower.load_weights(made.named_weights())
    found = follower.eval_step(data)
    assert float(found["accuracy"].mean()) == 1.0
    torch.testing.assert_close(
        found["reward_margin"], found["chosen_reward"] - found["rejected_reward"]
    )
    # The same rewards as of samples, prompts shared or not.
    samples = {**data, "response_ids": data["chosen_ids"]}
    del samples["chosen_ids"]
    got = follower.forward_step(samples)["reward"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, found["chosen_reward"], atol=1e-5, rtol=1e-5)
    assert torch.equal(made.forward_step(samples)["reward"], got)


def test_a_trained_reward_model_is_a_folder_that_others_load(tiny: Path, tmp_path: Path) -> None:
    made, data = trainer(RewardTrainer, tiny), pairs()
    made.train_step(made.micro_batches(made.prepare_batch(data)), 0)
    made.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = [
        theirs(torch.cat([p, r])[None]).logits[0, 0]
        for p, r in zip(data["prompt_ids"], data["chosen_ids"], strict=True)
    ]
    again = ready(RewardModel(path=tmp_path))
    samples = {"prompt_ids": data["prompt_ids"], "response_ids": data["chosen_ids"]}
    got = again.forward_step(samples)["reward"]
    torch.testing.assert_close(got, torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)


# ---- online -----------------------------------------------------------------------------------


def test_the_best_of_a_group_is_set_against_its_worst(tiny: Path) -> None:
    made, data = OnlineDPOTrainer(path=tiny), groups()
    data["reward"] = torch.tensor([2.0, 3.0, 1.0, 5.0, 5.0, 5.0, 0.0, 4.0, 4.0, 1.0, 1.0, 0.0])
    prepared = made.prepare_batch(data)
    rival = [None, 2, None, None, None, None, None, 6, None, 11, None, None]
    assert prepared["rival"] == rival
    assert prepared["is_tied"] == [False] * 3 + [True] * 3 + [False] * 6
    *parts, idle = made.micro_batches(prepared)
    found = [ids.tolist() for part in parts for ids in part["chosen_ids"]]
    assert sorted(found) == sorted(data["response_ids"][i].tolist() for i in (1, 7, 9))
    assert len(idle["group"]) == 12 - 6


def test_ties_and_rows_in_no_pair_are_counted(tiny: Path) -> None:
    made = trainer(OnlineDPOTrainer, tiny)
    metrics = made.train_step(made.micro_batches(made.prepare_batch(groups())), 0)
    assert metrics["pairs"] == 3
    assert (metrics["rows_trained"], metrics["rows_filtered"]) == (6, 6)
    assert metrics["groups_tied"] == 1


def test_a_batch_of_ties_changes_nothing(tiny: Path) -> None:
    made = trainer(OnlineDPOTrainer, tiny)
    before = {name: tensor.clone() for name, tensor in made.named_weights()}
    data = select(groups(), [3, 4, 5])
    metrics = made.train_step(made.micro_batches(made.prepare_batch(data)), 0)
    assert (metrics["rows_trained"], metrics["groups_tied"], metrics["loss"]) == (0, 1, 0.0)
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name


# ---- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RewardTrainer, {"chosen_ids": None}, "needs the column 'chosen_ids'.*preferences"),
        (DPOTrainer, {"rejected_ids": None}, "needs the column 'rejected_ids'.*preferences"),
        (DPOTrainer, {"reference_chosen_logprob": None}, "PreferenceReference makes"),
        (OnlineDPOTrainer, {"reward": None}, "needs the column 'reward'"),
        (OnlineDPOTrainer, {"reference_logprobs": None}, "needs the column 'reference_logprobs'"),
        (OnlineDPOTrainer, {"group": None}, "needs the column 'group'"),
        (OnlineDPOTrainer, {"reward": torch.tensor([0.0, float("nan")] * 6)}, "of row 1 is nan"),
        (OnlineDPOTrainer, {"group": torch.arange(12)}, "num_inference_per_prompt to 2 or more"),
        (
            OnlineDPOTrainer,
            {"reference_logprobs": [torch.zeros(30)] * 12},
            "row 0 has . response tokens but 30 values",
        ),
    ],
)
def test_a_batch_that_lacks_what_is_needed_is_refused(
    tiny: Path, kind: Any, change: dict[str, Any], message: str
) -> None:
    data = {k: v for k, v in {**data_for(kind), **change}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        kind(path=tiny).prepare_batch(data)


def test_margins_that_are_asked_for_must_be_there(tiny: Path) -> None:
    data = pairs()
    del data["margin"]
    made = RewardTrainer(path=tiny, settings=RewardModelSettings(use_margin=True))
    with pytest.raises(DataError, match="give every row a number 'margin'"):
        made.prepare_batch(data)
    RewardTrainer(path=tiny).prepare_batch(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_leaves_the_weights(tiny: Path, kind: Any) -> None:
    made = trainer(kind, tiny)
    before = {name: tensor.clone() for name, tensor in made.named_weights()}
    parts = made.micro_batches(made.prepare_batch(data_for(kind)))
    parts[0]["pair_weight"][0] = float("inf")
    with pytest.raises(NonFiniteError, match="weights were left"):
        made.train_step(parts, 0)
    for name, now in made.named_weights():
        assert torch.equal(before[name], now), name
