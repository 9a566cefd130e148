"""Micro-batches by token budget, and their shares among ranks. Pure; knows nothing of tensors.

The decision here: items are sorted by length and cut, longest first, rather than packed into as
few bins as possible. Neighbours of one length waste no padding, and what will not fit into memory
fails in the first micro-batch instead of the last. Ranks share them by their costs, not in turn:
the last rank to finish is what a step waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_flows.errors import ConfigError, DataError

__all__ = ["cut_by_tokens", "deal"]


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


def deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of `costs` for each of `num_ranks` ranks, their sums near each other; every index
    once, those of a rank in rising order. There may be ranks without any.

    Longest processing time first: the dearest that is left goes to the rank that has least. So the
    dearest rank has at most 4/3 - 1/(3 num_ranks) times what it has in the best deal there is
    (Graham, "Bounds on multiprocessing timing anomalies", 1969, theorem 3). Of equal ranks the one
    with fewer items is next, then the lower: the result depends on the costs alone.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (totals[r], len(shares[r]), r))
        shares[rank].append(index)
        totals[rank] += costs[index]
    return [sorted(share) for share in shares]
