from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import cut_by_tokens
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
