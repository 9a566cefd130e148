"""Token rewards, generalized advantages, whitening and the value loss, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_flows.algorithms import generalized_advantages, token_rewards, value_loss, whiten
from rlhf_flows.algorithms.kl import KLEstimator
from rlhf_flows.errors import DataError

NUMBER = st.floats(-5, 5, width=32)
TOKEN = st.tuples(NUMBER, NUMBER)
SAMPLES = st.lists(st.lists(TOKEN, min_size=1, max_size=7), min_size=1, max_size=6)
SHARE = st.floats(0, 1)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flat(samples: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = [token for sample in samples for token in sample]
    lengths = torch.tensor([len(sample) for sample in samples])
    return tensor(*(a for a, _ in tokens)), tensor(*(b for _, b in tokens)), lengths


def by_definition(
    samples: list[list[tuple[float, float]]], gamma: float, lambda_: float
) -> tuple[list[float], list[float]]:
    """The sum of eq. 16, token by token; no recursion."""
    advantages, returns = [], []
    for sample in samples:
        n = len(sample)
        values = [value for _, value in sample] + [0.0]
        deltas = [sample[t][0] + gamma * values[t + 1] - values[t] for t in range(n)]
        for t in range(n):
            total = sum((gamma * lambda_) ** (k - t) * deltas[k] for k in range(t, n))
            advantages.append(total)
            returns.append(total + values[t])
    return advantages, returns


@given(SAMPLES, SHARE, SHARE)
def test_advantages_are_the_sum_of_the_paper(samples, gamma: float, lambda_: float) -> None:
    got = generalized_advantages(*flat(samples), gamma=gamma, lambda_=lambda_)
    advantages, returns = by_definition(samples, gamma, lambda_)
    torch.testing.assert_close(got.advantages, tensor(*advantages), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.returns, tensor(*returns), atol=1e-6, rtol=1e-6)


def test_advantages_by_hand() -> None:
    # delta = (1 + 0.5 * 4 - 2, 3 + 0 - 4) = (1, -1); A_0 = 1 + 0.5 * 0.5 * -1
    got = generalized_advantages(
        tensor(1, 3, 5), tensor(2, 4, 1), torch.tensor([2, 1]), gamma=0.5, lambda_=0.5
    )
    assert got.advantages.tolist() == [0.75, -1.0, 4.0]
    assert got.returns.tolist() == [2.75, 3.0, 5.0]


@given(SAMPLES)
def test_without_discount_the_advantage_is_the_reward_to_go_minus_the_value(samples) -> None:
    got = generalized_advantages(*flat(samples), gamma=1.0, lambda_=1.0)
    to_go = [sum(r for r, _ in sample[t:]) for sample in samples for t in range(len(sample))]
    torch.testing.assert_close(got.returns, tensor(*to_go))
    torch.testing.assert_close(got.advantages, tensor(*to_go) - flat(samples)[1])


@given(SAMPLES, SHARE)
def test_with_lambda_zero_the_advantage_is_the_error_of_one_step(samples, gamma: float) -> None:
    got = generalized_advantages(*flat(samples), gamma=gamma, lambda_=0.0)
    errors = [
        r + gamma * (sample[t + 1][1] if t + 1 < len(sample) else 0.0) - v
        for sample in samples
        for t, (r, v) in enumerate(sample)
    ]
    torch.testing.assert_close(got.advantages, tensor(*errors))


def test_a_sample_does_not_see_its_neighbours() -> None:
    both = generalized_advantages(tensor(1, 2, 3), tensor(4, 5, 6), torch.tensor([1, 2]))
    alone = generalized_advantages(tensor(2, 3), tensor(5, 6), torch.tensor([2]))
    assert torch.equal(both.advantages[1:], alone.advantages)


def test_advantages_carry_no_gradient_and_keep_the_precision_of_values() -> None:
    values = torch.zeros(2, requires_grad=True)
    got = generalized_advantages(torch.ones(2), values, torch.tensor([2]))
    assert not got.advantages.requires_grad
    assert got.returns.dtype == torch.float32


def test_no_samples_have_no_advantages() -> None:
    nothing = torch.empty(0)
    lengths = torch.empty(0, dtype=torch.int64)
    assert len(generalized_advantages(nothing, nothing, lengths).advantages) == 0


@pytest.mark.parametrize("what", ["reward", "value"])
def test_a_number_that_is_not_finite_is_refused_by_row_and_token(what: str) -> None:
    rewards, values = tensor(1, 2, 3, 4), tensor(1, 2, 3, 4)
    (rewards if what == "reward" else values)[2] = math.nan
    with pytest.raises(DataError, match=f"the {what} of token 1 of row 1 is nan"):
        generalized_advantages(rewards, values, torch.tensor([1, 3]))
    with pytest.raises(DataError, match="4 rewards for 5 response tokens"):
        generalized_advantages(tensor(1, 2, 3, 4), values, torch.tensor([1, 4]))


# ---- whitening --------------------------------------------------------------------------------


@given(st.lists(NUMBER, min_size=2, max_size=20))
def test_whitened_advantages_have_mean_zero_and_variance_one(numbers: list[float]) -> None:
    white = whiten(tensor(*numbers), eps=0.0)
    if len(set(numbers)) == 1:
        assert torch.equal(white, torch.zeros_like(white))
        return
    mean = sum(numbers) / len(numbers)
    std = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    torch.testing.assert_close(white * std, tensor(*numbers) - mean, atol=1e-6, rtol=1e-6)


def test_masked_tokens_neither_count_nor_get_anything() -> None:
    mask = torch.tensor([True, False, True, False])
    white = whiten(tensor(1, 100, 3, -7), mask=mask, eps=0.0)
    assert white.tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert torch.equal(whiten(tensor(1, 2), mask=torch.tensor([False, False])), tensor(0, 0))


# ---- token rewards ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kl"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5)])
def test_token_rewards_by_hand(kind: KLEstimator, kl: float) -> None:
    got = token_rewards(
        tensor(3, -8),
        tensor(-2, -1, -1.5),
        tensor(-1.5, -1, -1),
        torch.tensor([2, 1]),
        kl_coef=0.1,
        kl_estimator=kind,
        score_clip=5.0,
    )
    torch.testing.assert_close(got, tensor(-0.1 * kl, 3.0, -0.1 * kl - 5.0))


@given(SAMPLES, st.floats(0, 1), NUMBER)
def test_rewards_of_a_sample_sum_to_its_score_less_its_divergence(
    samples, kl_coef: float, score: float
) -> None:
    policy, reference, lengths = flat(samples)
    scores = torch.full((len(samples),), score, dtype=torch.float64)
    got = token_rewards(scores, policy, reference, lengths, kl_coef=kl_coef)
    for part, sample in zip(got.split(lengths.tolist()), samples, strict=True):
        expected = score - kl_coef * sum(p - q for p, q in sample)
        assert float(part.sum()) == pytest.approx(expected, abs=1e-6)


def test_rows_that_cannot_be_rewarded_are_named() -> None:
    lengths = torch.tensor([1, 1])
    with pytest.raises(DataError, match="score of row 1 is inf"):
        token_rewards(tensor(0, math.inf), tensor(0, 0), tensor(0, 0), lengths, kl_coef=0.1)
    with pytest.raises(DataError, match="reference logprob of token 0 of row 1 is -inf"):
        token_rewards(tensor(0, 0), tensor(0, 0), tensor(0, -math.inf), lengths, kl_coef=0.1)
    with pytest.raises(DataError, match="row 1 has no response token"):
        token_rewards(tensor(0, 0), tensor(0), tensor(0), torch.tensor([1, 0]), kl_coef=0.1)


# ---- the value loss ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loss", "slope", "clipped"),
    [
        (1.1, 0.5 * 0.9**2, -0.9, False),  # within the bounds
        (1.5, 0.5 * 0.8**2, 0.0, True),  # moved to the return, beyond the bound: enough
        (0.5, 0.5 * 1.5**2, -1.5, False),  # moved away from it: all of it counts
    ],
)
def test_the_value_loss_by_hand(value: float, loss: float, slope: float, clipped: bool) -> None:
    values = tensor(value).requires_grad_()
    got = value_loss(values, tensor(1.0), tensor(2.0), clip=0.2)
    got.loss.sum().backward()
    assert got.loss.item() == pytest.approx(loss)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(slope)
    assert got.clipped.tolist() == [clipped]


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=9), st.floats(0.01, 2))
def test_the_value_loss_is_the_larger_of_the_two_squares(rows, clip: float) -> None:
    values, old, returns = (tensor(*(row[i] for row in rows)) for i in range(3))
    expected = [
        0.5 * max((v - r) ** 2, (min(max(v, o - clip), o + clip) - r) ** 2) for v, o, r in rows
    ]
    got = value_loss(values, old, returns, clip=clip).loss
    torch.testing.assert_close(got, tensor(*expected), atol=1e-6, rtol=1e-6)
    plain = value_loss(values, old, returns, clip=None).loss
    torch.testing.assert_close(plain, 0.5 * (values - returns) ** 2)


def test_the_gradient_of_the_value_loss_is_the_slope_of_its_value() -> None:
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 40, generator=g, dtype=torch.float64)
    for clip in (0.2, None):
        inputs = (values.clone().requires_grad_(),)

        def loss(v: Tensor, clip: float | None = clip) -> Tensor:
            return value_loss(v, old, returns, clip=clip).loss

        assert torch.autograd.gradcheck(loss, inputs)
