"""Losses on pairs: DPO, cDPO, IPO and the reward model's, against the formulas in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_flows.algorithms import dpo_loss, preference_loss
from rlhf_flows.algorithms.dpo import PairKind
from rlhf_flows.errors import DataError

NUMBER = st.floats(-30, 30, width=32)
PAIRS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), min_size=1, max_size=8)
KINDS: tuple[PairKind, ...] = ("dpo", "ipo")


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(rows: list[tuple[float, ...]]) -> list[Tensor]:
    return [tensor(*values) for values in zip(*rows, strict=True)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@given(PAIRS, st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_is_the_formula_of_the_paper(rows, beta: float, smoothing: float) -> None:
    got = dpo_loss(*columns(rows), beta=beta, label_smoothing=smoothing)
    expected, better, worse = [], [], []
    for chosen, rejected, ref_chosen, ref_rejected in rows:
        x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        expected.append(-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x))
        better.append(beta * (chosen - ref_chosen))
        worse.append(beta * (rejected - ref_rejected))
    torch.testing.assert_close(got.loss, tensor(*expected), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.chosen_rewards, tensor(*better), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.rejected_rewards, tensor(*worse), atol=1e-6, rtol=1e-6)


@given(PAIRS, st.floats(0.01, 2))
def test_ipo_is_the_formula_of_the_paper(rows, beta: float) -> None:
    got = dpo_loss(*columns(rows), beta=beta, kind="ipo").loss
    expected = [((a - c) - (b - d) - 1 / (2 * beta)) ** 2 for a, b, c, d in rows]
    torch.testing.assert_close(got, tensor(*expected), atol=1e-6, rtol=1e-6)


def test_at_the_reference_dpo_is_log_two_whatever_the_label_smoothing() -> None:
    same = tensor(-3.0)
    for smoothing in (0.0, 0.3):
        loss = dpo_loss(same, same, same, same, label_smoothing=smoothing).loss
        assert loss.item() == pytest.approx(math.log(2))


def test_ipo_is_zero_at_its_target_and_smoothed_dpo_at_least_there() -> None:
    zero = tensor(0.0)
    assert dpo_loss(tensor(5.0), zero, zero, zero, beta=0.1, kind="ipo").loss.item() == 0.0
    # sigmoid(beta h) = 1 - s at the minimum of the smoothed loss
    h = tensor(math.log(0.8 / 0.2) / 0.1).requires_grad_()
    dpo_loss(h, zero, zero, zero, beta=0.1, label_smoothing=0.2).loss.sum().backward()
    assert h.grad is not None
    assert h.grad.item() == pytest.approx(0.0, abs=1e-9)


def test_only_the_policy_gets_a_gradient_and_its_the_slope_of_the_loss() -> None:
    g = torch.Generator().manual_seed(0)
    chosen, rejected, *reference = torch.randn(4, 6, generator=g, dtype=torch.float64) * 3
    inputs = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
    for kind in KINDS:
        for smoothing in (0.0, 0.1):

            def loss(a: Tensor, b: Tensor, k: PairKind = kind, s: float = smoothing) -> Tensor:
                return dpo_loss(a, b, *reference, beta=0.3, kind=k, label_smoothing=s).loss

            assert torch.autograd.gradcheck(loss, inputs)
    assert not dpo_loss(*inputs, *reference).chosen_rewards.requires_grad


@given(PAIRS, st.floats(0, 1))
def test_the_reward_models_loss_is_the_formula_of_the_paper(rows, center: float) -> None:
    chosen, rejected, margin, _ = columns(rows)
    got = preference_loss(chosen, rejected, margin=margin, center_coef=center)
    expected = [-log_sigmoid(a - b - m) + center * (a + b) ** 2 for a, b, m, _ in rows]
    torch.testing.assert_close(got, tensor(*expected), atol=1e-6, rtol=1e-6)
    plain = preference_loss(chosen, rejected)
    torch.testing.assert_close(plain, tensor(*(-log_sigmoid(a - b) for a, b, _, _ in rows)))


def test_the_gradient_of_the_reward_models_loss_is_its_slope() -> None:
    g = torch.Generator().manual_seed(1)
    rewards = torch.randn(2, 5, generator=g, dtype=torch.float64)
    margin = torch.rand(5, generator=g, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return preference_loss(a, b, margin=margin, center_coef=0.01)

    inputs = (rewards[0].clone().requires_grad_(), rewards[1].clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_pairs_that_nothing_can_be_learned_from_are_named() -> None:
    fine, bad = tensor(0, 0), tensor(0, math.nan)
    with pytest.raises(DataError, match="the rejected logprob of pair 1 is nan"):
        dpo_loss(fine, bad, fine, fine)
    with pytest.raises(DataError, match="reference's chosen logprob of pair 1 is nan"):
        dpo_loss(fine, fine, bad, fine)
    with pytest.raises(DataError, match="the chosen reward of pair 1 is nan"):
        preference_loss(bad, fine)
    with pytest.raises(DataError, match="the margin of pair 1 is nan"):
        preference_loss(fine, fine, margin=bad)
