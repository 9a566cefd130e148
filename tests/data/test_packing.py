from __future__ import annotations

from itertools import chain, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import cut_by_tokens, deal
from rlhf_flows.errors import ConfigError, DataError

costs = st.lists(st.integers(0, 60), max_size=40)


@given(costs, st.integers(1, 80))
def test_every_item_comes_once_and_only_single_items_exceed_the_budget(
    costs: list[int], budget: int
) -> None:
    bins = cut_by_tokens(costs, budget=budget)
    assert sorted(chain.from_iterable(bins)) == list(range(len(costs)))
    assert all(len(one) == 1 or sum(costs[i] for i in one) <= budget for one in bins)
    assert all(bins)


@given(costs, st.integers(1, 80))
def test_items_come_longest_first_and_no_bin_closes_early(costs: list[int], budget: int) -> None:
    bins = cut_by_tokens(costs, budget=budget)
    order = [costs[i] for i in chain.from_iterable(bins)]
    assert order == sorted(order, reverse=True)
    for one, following in pairwise(bins):
        assert sum(costs[i] for i in one) + costs[following[0]] > budget


def test_a_cut_by_hand() -> None:
    assert cut_by_tokens([3, 9, 5, 5, 2], budget=10) == [[1], [2, 3], [0, 4]]
    assert cut_by_tokens([], budget=10) == []


def test_a_budget_or_cost_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro-batch of 0 tokens"):
        cut_by_tokens([1], budget=0)
    with pytest.raises(DataError, match="item 1 costs -2"):
        cut_by_tokens([1, -2], budget=3)


@given(costs, st.integers(1, 7))
def test_a_deal_gives_every_item_to_one_rank(costs: list[int], num_ranks: int) -> None:
    shares = deal(costs, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(chain.from_iterable(shares)) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_the_dearest_rank_is_within_grahams_bound_of_the_best_deal(
    costs: list[int], num_ranks: int
) -> None:
    dearest = max(sum(costs[i] for i in share) for share in deal(costs, num_ranks))
    best = min(
        max(sum(c for c, r in zip(costs, ranks, strict=True) if r == n) for n in range(num_ranks))
        for ranks in product(range(num_ranks), repeat=len(costs))
    )
    assert 3 * num_ranks * dearest <= (4 * num_ranks - 1) * best


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_grahams_worst_case_meets_the_bound_exactly(num_ranks: int) -> None:
    """Two each of 2 n - 1 down to n + 1, and three of n: 4 n - 1 where 3 n can be had."""
    n = num_ranks
    costs = [c for cost in range(2 * n - 1, n, -1) for c in (cost, cost)] + [n] * 3
    dearest = max(sum(costs[i] for i in share) for share in deal(costs, n))
    assert dearest == 4 * n - 1


def test_a_deal_by_hand() -> None:
    assert deal([2, 9, 4, 4, 1], 2) == [[1, 4], [0, 2, 3]]
    assert deal([5], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]
    assert deal([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]
