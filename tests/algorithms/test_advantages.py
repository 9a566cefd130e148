from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.algorithms.advantages import Normalize, group_advantages
from rlhf_flows.errors import DataError

NORMALIZE: tuple[Normalize, ...] = ("group", "batch", "none")
REWARDS = st.lists(
    st.tuples(st.integers(0, 4), st.floats(-100, 100, width=32)), min_size=1, max_size=40
)


def by_hand(rewards: list[float], groups: list[int]) -> list[float]:
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(own) / len(own)
        variance = sum((r - mean) ** 2 for r in own) / max(len(own) - 1, 1)
        advantages.append((reward - mean) / (math.sqrt(variance) + 1e-4))
    return advantages


@given(REWARDS, st.sampled_from(NORMALIZE))
def test_advantages_of_a_group_sum_to_zero(rows, normalize: Normalize) -> None:
    groups = torch.tensor([g for g, _ in rows])
    rewards = torch.tensor([r for _, r in rows])
    advantages = group_advantages(rewards, groups, normalize=normalize)
    for group in groups.unique():
        own = advantages[groups == group]
        assert abs(float(own.sum())) <= 1e-5 * max(1.0, float(own.abs().sum()))


@given(REWARDS)
def test_group_normalization_is_the_formula_of_grpo(rows) -> None:
    groups, rewards = [g for g, _ in rows], [r for _, r in rows]
    got = group_advantages(torch.tensor(rewards), torch.tensor(groups))
    expected = torch.tensor(by_hand(rewards, groups))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@given(REWARDS, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(rows, rng) -> None:
    order = list(range(len(rows)))
    rng.shuffle(order)
    groups = torch.tensor([g for g, _ in rows])
    rewards = torch.tensor([r for _, r in rows])
    straight = group_advantages(rewards, groups)
    shuffled = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(shuffled, straight[order], atol=1e-4, rtol=1e-4)


def test_the_three_normalizations_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])
    groups = torch.tensor([7, 7, 2, 2])
    std_group, std_batch = math.sqrt(0.5), math.sqrt((0.75**2 + 1.75**2 + 2 * 1.25**2) / 3)
    for normalize, scale in (("group", std_group), ("batch", std_batch), ("none", 1.0)):
        got = group_advantages(rewards, groups, normalize=normalize, eps=1e-12)
        expected = torch.tensor([0.5, -0.5, 0.0, 0.0]) / scale
        torch.testing.assert_close(got, expected)


def test_equal_rewards_have_exactly_zero_advantage() -> None:
    advantages = group_advantages(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(advantages, torch.zeros(7))


def test_a_lonely_sample_has_advantage_zero() -> None:
    for normalize in NORMALIZE:
        got = group_advantages(torch.tensor([3.0]), torch.tensor([0]), normalize=normalize)
        assert got.tolist() == [0.0]


def test_no_samples_have_no_advantages() -> None:
    assert len(group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64))) == 0


def test_a_reward_that_is_not_a_number_is_refused_by_its_row() -> None:
    with pytest.raises(DataError, match="row 1 is nan"):
        group_advantages(torch.tensor([0.0, float("nan")]), torch.tensor([0, 0]))
