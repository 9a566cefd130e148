"""Micro-batches by token budget. Pure; knows nothing of tensors.

The decision here: items are sorted by length and cut, longest first, rather than packed into as
few bins as possible. Neighbours of one length waste no padding, and what will not fit into memory
fails in the first micro-batch instead of the last.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_flows.errors import ConfigError, DataError

__all__ = ["cut_by_tokens"]


def cut_by_tokens(costs: Sequence[int], *, budget: int) -> list[list[int]]:
    """Indices of `costs` in bins whose costs sum to at most `budget`; every index once.

    An item dearer than the budget gets a bin of its own. Longest first, equal ones in their order,
    so the result depends on the costs alone. Raises ConfigError for a budget below 1, DataError
    for a negative cost.
    """
    if budget < 1:
        raise ConfigError(f"a micro-batch of {budget} tokens was asked for: allow at least 1")
    bins: list[list[int]] = []
    room = 0
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost = costs[index]
        if cost < 0:
            raise DataError(f"item {index} costs {cost} tokens: a number of tokens is 0 or more")
        if not bins or cost > room:
            bins.append([])
            room = budget
        bins[-1].append(index)
        room -= cost
    return bins
