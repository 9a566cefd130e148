"""Whole losses on ragged batches, against loops in plain Python written from the papers.

What stands below the first line of dashes knows nothing of this package or of torch. Single
formulas (GAE, DPO, IPO, the reward model's loss, group advantages, whitening, the clip of values)
have loops of their own in the files of their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_flows.algorithms import (
    RunningMoments,
    adapted_kl_coef,
    denormalized,
    generalized_advantages,
    kl_estimate,
    nll,
    policy_loss,
    preference_loss,
    token_weights,
    value_loss,
    whiten,
)
from rlhf_flows.algorithms.aggregation import Aggregation
from rlhf_flows.pools.averages import WeightAverages

NUMBER = st.floats(-5, 5, width=32)
SHARE = st.floats(0, 1)
EXACT = {"atol": 1e-6, "rtol": 1e-6}


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def ragged(*fields: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[tuple[float, ...]]]]:
    """Up to five samples of one to six tokens."""
    sample = st.lists(st.tuples(*fields), min_size=1, max_size=6)
    return st.lists(sample, min_size=1, max_size=5)


def columns(samples: Sequence[Sequence[Sequence[float]]]) -> tuple[list[Tensor], Tensor]:
    tokens = [token for sample in samples for token in sample]
    lengths = torch.tensor([len(sample) for sample in samples])
    return [tensor(column) for column in zip(*tokens, strict=True)], lengths


# ---- from the papers, without torch -----------------------------------------------------------


def log_softmax(logits: Sequence[float], chosen: int) -> float:
    top = max(logits)
    return logits[chosen] - top - math.log(math.fsum(math.exp(x - top) for x in logits))


def mean_over(samples: Sequence[Sequence[float]], how: str, longest: int) -> float:
    """Of token losses: over all tokens, over sequences of their means, or by a constant."""
    if how == "token":
        flat = [x for sample in samples for x in sample]
        return math.fsum(flat) / len(flat)
    if how == "sequence":
        return math.fsum(math.fsum(s) / len(s) for s in samples) / len(samples)
    return math.fsum(math.fsum(s) for s in samples) / (len(samples) * longest)


def clipped_gain(now: float, old: float, advantage: float, low: float, high: float) -> float:
    """PPO's objective (1707.06347, eq. 7), to be maximized."""
    ratio = math.exp(now - old)
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def advantages_by_sums(
    rewards: Sequence[float], values: Sequence[float], end: float, gamma: float, lambda_: float
) -> list[float]:
    """GAE as the average of k-step advantages that it is defined as (1506.02438, eq. 14 to 16)."""
    n = len(rewards)
    after = [*values, end]
    found = []
    for t in range(n):
        total = 0.0
        for k in range(1, n - t + 1):
            steps = math.fsum(gamma**i * rewards[t + i] for i in range(k))
            estimate = steps + gamma**k * after[t + k] - values[t]
            # The last one stands for all longer ones, which would be the same.
            weight = lambda_ ** (k - 1) * (1.0 if k == n - t else 1.0 - lambda_)
            total += weight * estimate
        found.append(total)
    return found


def moments(batches: Sequence[Sequence[float]], beta: float | None) -> tuple[float, float]:
    """Mean and mean of squares: weights of batches beta^age, or of all values alike."""
    if beta is None:
        seen = [x for batch in batches for x in batch]
        return math.fsum(seen) / len(seen), math.fsum(x * x for x in seen) / len(seen)
    weights = [beta ** (len(batches) - 1 - i) for i in range(len(batches))]
    means = [math.fsum(b) / len(b) for b in batches]
    squares = [math.fsum(x * x for x in b) / len(b) for b in batches]
    whole = math.fsum(weights)
    return (
        math.fsum(w * m for w, m in zip(weights, means, strict=True)) / whole,
        math.fsum(w * s for w, s in zip(weights, squares, strict=True)) / whole,
    )


def clipped_square(value: float, old: float, target: float, clip: float) -> float:
    bounded = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (bounded - target) ** 2) / 2


# ---- supervised and reward losses -------------------------------------------------------------


@given(
    ragged(NUMBER, NUMBER, NUMBER, st.integers(0, 2)),
    st.sampled_from(["token", "sequence", "fixed"]),
)
def test_the_supervised_loss_of_a_batch(samples, aggregation: Aggregation) -> None:
    tokens = [token for sample in samples for token in sample]
    logits = torch.tensor([token[:3] for token in tokens], dtype=torch.float64)  # [T, 3]
    targets = torch.tensor([token[3] for token in tokens])
    lengths = torch.tensor([len(sample) for sample in samples])
    weights = token_weights(lengths, aggregation=aggregation, max_length=7).double()
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    got = float((weights * nll(logprobs)).sum())
    losses = [[-log_softmax(token[:3], token[3]) for token in sample] for sample in samples]
    assert got == pytest.approx(mean_over(losses, aggregation, 7), abs=1e-6)


def test_the_gradient_of_the_supervised_loss_is_its_slope() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    targets, lengths = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4, 2])
    weights = token_weights(lengths, aggregation="sequence").double()

    def loss(x: Tensor) -> Tensor:
        return (weights * nll(x.log_softmax(-1).gather(-1, targets[:, None])[:, 0])).sum()

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=6))
def test_the_pairwise_loss_is_the_surprise_of_the_preference(pairs) -> None:
    """As a choice between two by softmax, which is what Bradley and Terry say."""
    got = preference_loss(*(tensor(x) for x in zip(*pairs, strict=True)))
    torch.testing.assert_close(got, tensor([-log_softmax(pair, 0) for pair in pairs]), **EXACT)


# ---- policy -----------------------------------------------------------------------------------

LOGPROB = st.floats(-4, 0, width=32)


@given(ragged(LOGPROB, LOGPROB, NUMBER), st.sampled_from(["token", "sequence", "fixed"]))
def test_the_clipped_policy_loss_of_a_batch(samples, aggregation: Aggregation) -> None:
    (now, old, advantages), lengths = columns(samples)
    found = policy_loss(now, old, advantages, clip_low=0.2, clip_high=0.28)
    weights = token_weights(lengths, aggregation=aggregation, max_length=7).double()
    losses = [[-clipped_gain(*token, 0.2, 0.28) for token in sample] for sample in samples]
    expected = mean_over(losses, aggregation, 7)
    # Weights are float32.
    assert float((weights * found.loss).sum()) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_gradients_of_policy_and_kl_are_their_slopes() -> None:
    g = torch.Generator().manual_seed(3)
    now, old, advantages = torch.randn(3, 30, generator=g, dtype=torch.float64)
    inputs = (now.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages).loss, inputs)
    for kind in ("k1", "k2", "k3"):

        def kl(x: Tensor, kind=kind) -> Tensor:
            return kl_estimate(x, old, kind=kind)

        assert torch.autograd.gradcheck(kl, inputs)


# ---- advantages -------------------------------------------------------------------------------


@given(ragged(NUMBER, NUMBER), st.lists(NUMBER, min_size=5, max_size=5), SHARE, SHARE)
def test_advantages_with_and_without_an_end(samples, ends, gamma: float, lambda_: float) -> None:
    (rewards, values), lengths = columns(samples)
    for known in (ends[: len(samples)], None):
        end_values = None if known is None else tensor(known)
        got = generalized_advantages(
            rewards, values, lengths, gamma=gamma, lambda_=lambda_, end_values=end_values
        )
        expected = []
        for i, sample in enumerate(samples):
            of_rewards, of_values = zip(*sample, strict=True)
            end = 0.0 if known is None else known[i]
            expected += advantages_by_sums(of_rewards, of_values, end, gamma, lambda_)
        torch.testing.assert_close(got.advantages, tensor(expected), **EXACT)
        torch.testing.assert_close(got.returns, tensor(expected) + values, **EXACT)


@given(ragged(NUMBER, st.booleans()))
def test_whitening_is_over_all_tokens_that_count(samples) -> None:
    (advantages, mask), _ = columns(samples)
    flat = [token for sample in samples for token in sample]
    chosen = [a for a, counts in flat if counts]
    got = whiten(advantages, mask=mask.bool(), eps=1e-8)
    expected = [0.0] * len(flat)
    if len(set(chosen)) > 1:
        mean = math.fsum(chosen) / len(chosen)
        variance = math.fsum((a - mean) ** 2 for a in chosen) / len(chosen)
        expected = [(a - mean) / math.sqrt(variance + 1e-8) * c for a, c in flat]
    torch.testing.assert_close(got, tensor(expected), atol=1e-6, rtol=1e-5)


# ---- values with normalization ----------------------------------------------------------------

BATCHES = st.lists(st.lists(NUMBER, min_size=1, max_size=6), min_size=1, max_size=5)


@given(BATCHES, st.sampled_from([None, 0.0, 0.5, 0.99995]), NUMBER)
def test_running_moments(batches, beta: float | None, shift: float) -> None:
    batches = [[x + 100 * shift for x in batch] for batch in batches]
    kind = "ma" if beta is None else "exp"
    held = RunningMoments(kind, beta=beta or 0.0, eps=1e-5)
    assert (float(held.mean), float(held.std)) == (0.0, 1.0)
    for batch in batches:
        held.update(tensor(batch))
    held.update(torch.empty(0))  # nothing to learn from
    mean, square = moments(batches, beta)
    assert float(held.mean) == pytest.approx(mean, abs=1e-6)
    variance = max(square - mean * mean, 0.0) + 1e-5
    assert float(held.std) ** 2 == pytest.approx(variance, abs=1e-6, rel=1e-6)
    values = tensor(batches[-1])
    back = denormalized(held.normalized(values), held.mean, held.std)
    torch.testing.assert_close(back, values, **EXACT)


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=8), st.floats(0.01, 2))
def test_the_loss_of_normalized_values(rows, clip: float) -> None:
    outputs, old, returns = (tensor(x) for x in zip(*rows, strict=True))
    held = RunningMoments("ma", eps=1e-2)
    held.update(returns)
    got = value_loss(outputs, old, held.normalized(returns), clip=clip).loss
    mean, square = moments([[row[2] for row in rows]], None)
    std = math.sqrt(max(square - mean * mean, 0.0) + 1e-2)
    expected = [clipped_square(u, o, (r - mean) / std, clip) for u, o, r in rows]
    torch.testing.assert_close(got, tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_scale_moves_no_gradient_but_that_of_the_loss() -> None:
    outputs, old, returns = torch.randn(
        3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    held = RunningMoments("exp", beta=0.9)
    held.update(10 * returns)

    def loss(x: Tensor) -> Tensor:
        return value_loss(x, old, held.normalized(10 * returns)).loss

    assert torch.autograd.gradcheck(loss, (outputs.requires_grad_(),))


# ---- what changes from episode to episode -----------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "count", "expected"),
    [
        (6.0, 512, 0.2),  # on its target
        (6.6, 1000, 0.2 * 1.01),  # a tenth above it, a tenth of the horizon
        (60.0, 1000, 0.2 * 1.02),  # no more than a fifth
        (-5.0, 1000, 0.2 * 0.98),
        (0.0, 100_000, 0.0),  # never below zero
    ],
)
def test_the_adaptive_coefficient_by_hand(kl: float, count: int, expected: float) -> None:
    got = adapted_kl_coef(0.2, kl=kl, num_samples=count, target=6.0, horizon=10_000)
    assert got == pytest.approx(expected)


@given(st.lists(NUMBER, min_size=2, max_size=8), SHARE)
def test_the_average_of_weights_is_the_recursion_written_out(versions, eta: float) -> None:
    averages = WeightAverages({"reference": eta}, [("w", tensor(versions[:1]))])
    expected = versions[0]
    for weight in versions[1:]:
        averages.update([("w", tensor([weight]))])
        expected = eta * weight + (1 - eta) * expected
    ((_, got),) = averages.weights("reference", [("w", tensor([0.0]))])
    assert float(got) == pytest.approx(expected, abs=1e-6)
