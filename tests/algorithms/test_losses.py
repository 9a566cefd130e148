"""KL estimators, the clipped loss, importance weights, truncation, likelihood: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.algorithms import (
    apply_truncation,
    importance_weights,
    kl_estimate,
    nll,
    policy_loss,
)

LOGPROB = st.floats(-8, 0, width=32)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kl_estimators_by_hand() -> None:
    policy, reference = tensor(-1.0), tensor(-1.5)
    assert kl_estimate(policy, reference, kind="k1").item() == 0.5
    assert kl_estimate(policy, reference, kind="k2").item() == 0.125
    assert kl_estimate(policy, reference, kind="k3").item() == pytest.approx(math.exp(-0.5) - 0.5)


@given(LOGPROB, LOGPROB)
def test_k3_is_never_negative_and_zero_only_where_they_agree(policy: float, ref: float) -> None:
    value = kl_estimate(tensor(policy), tensor(ref), kind="k3").item()
    assert value >= 0
    # Near agreement it is the square of the distance, which has nine digits less to be zero in.
    distance = abs(policy - ref)
    assert value > 0 if distance > 1e-8 else value < 1e-15


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.integers(0, 2**31))
def test_k1_and_k3_have_the_kl_as_their_mean(logits: list[float], seed: int) -> None:
    p = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(len(logits), generator=torch.Generator().manual_seed(seed)).double()
    q = q.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(p, q, kind=kind)).sum(), kl)


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    q = tensor(0.1, 0.2, 0.3, 0.15, 0.25).log()
    p = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    sampled = (p.detach().exp() * kl_estimate(p, q, kind="k2")).sum()
    (got,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, False),
        (1.5, 2.0, -2.6, 0.0, True),  # above 1.3 a good token earns nothing more
        (1.5, -2.0, 3.0, 3.0, False),  # but a bad one still costs
        (0.5, -2.0, 1.6, 0.0, True),  # below 0.8 a bad token is bad enough
        (0.5, 2.0, -1.0, -1.0, False),
    ],
)
def test_the_clipped_loss_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, clipped: bool
) -> None:
    old = tensor(-2.0)
    logprobs = (old + math.log(ratio)).requires_grad_()
    got = policy_loss(logprobs, old, tensor(advantage), clip_low=0.2, clip_high=0.3)
    got.loss.sum().backward()
    assert got.loss.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope)
    assert got.clipped.tolist() == [clipped]
    assert got.ratio.item() == pytest.approx(ratio)


@given(st.lists(st.tuples(LOGPROB, st.floats(-3, 3)), min_size=1, max_size=9))
def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient(rows) -> None:
    logprobs = tensor(*(p for p, _ in rows)).requires_grad_()
    advantages = tensor(*(a for _, a in rows))
    policy_loss(logprobs, logprobs.detach(), advantages).loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_importance_weights_by_hand() -> None:
    old, behaviour = tensor(-1.0, -1.0, -1.0), tensor(-1.5, -3.0, -0.5)
    lengths = torch.tensor([2, 1])
    none = importance_weights(old, behaviour, lengths, kind="none")
    assert none.tolist() == [1.0, 1.0, 1.0]
    token = importance_weights(old, behaviour, lengths, kind="token", cap=2.0)
    torch.testing.assert_close(token, tensor(math.exp(0.5), 2.0, math.exp(-0.5)))
    sequence = importance_weights(old, behaviour, lengths, kind="sequence", cap=20.0)
    torch.testing.assert_close(sequence, tensor(math.exp(2.5), math.exp(2.5), math.exp(-0.5)))


def test_importance_weights_carry_no_gradient() -> None:
    old = tensor(-1.0).requires_grad_()
    weights = importance_weights(old, tensor(-2.0), torch.tensor([1]), kind="token")
    assert not weights.requires_grad


@given(st.lists(LOGPROB, min_size=1, max_size=6), st.floats(0.5, 3))
def test_importance_weights_correct_the_expectation_where_no_cap_is_met(
    logits: list[float], scale: float
) -> None:
    behaviour = tensor(*logits).log_softmax(-1)
    old = (scale * tensor(*logits)).log_softmax(-1)
    n = torch.ones(len(logits), dtype=torch.int64)
    weights = importance_weights(old, behaviour, n, kind="token", cap=1e9)
    torch.testing.assert_close((behaviour.exp() * weights).sum(), tensor(1.0)[0])


def test_truncation_by_hand() -> None:
    rewards, truncated = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    kept = apply_truncation(rewards, truncated, kind="keep", penalty=0.5)
    assert (kept[0].tolist(), kept[1].tolist()) == ([1.0, 2.0], [True, True])
    masked = apply_truncation(rewards, truncated, kind="mask", penalty=0.5)
    assert (masked[0].tolist(), masked[1].tolist()) == ([1.0, 2.0], [False, True])
    penalized = apply_truncation(rewards, truncated, kind="penalize", penalty=0.5)
    assert (penalized[0].tolist(), penalized[1].tolist()) == ([0.5, 2.0], [True, True])


def test_the_likelihood_loss_is_cross_entropy() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2, 3, 4])
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll(logprobs), expected)
