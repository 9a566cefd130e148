from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.algorithms.aggregation import Aggregation, token_weights

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12)
AGGREGATIONS: tuple[Aggregation, ...] = ("token", "sequence", "fixed")


def naive(losses: list[torch.Tensor], aggregation: Aggregation, max_length: int) -> float:
    losses = [x for x in losses if len(x)]
    if not losses:
        return 0.0
    if aggregation == "token":
        return float(torch.cat(losses).mean())
    if aggregation == "sequence":
        return float(torch.stack([x.mean() for x in losses]).mean())
    return float(sum(x.sum() for x in losses) / (len(losses) * max_length))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(lengths=LENGTHS)
def test_the_weighted_sum_is_the_loss_by_its_definition(
    aggregation: Aggregation, lengths: list[int]
) -> None:
    losses = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    weights = token_weights(torch.tensor(lengths), aggregation=aggregation, max_length=9)
    got = float((weights * torch.cat(losses)).sum())
    assert got == pytest.approx(naive(losses, aggregation, 9), abs=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(lengths=LENGTHS, drop=st.integers(0, 11))
def test_masking_a_sample_equals_leaving_it_out(
    aggregation: Aggregation, lengths: list[int], drop: int
) -> None:
    drop %= len(lengths)
    counts = torch.tensor(lengths)
    kept = torch.tensor([i != drop for i in range(len(lengths))])
    mask = torch.repeat_interleave(kept, counts)
    masked = token_weights(counts, aggregation=aggregation, max_length=9, mask=mask)
    alone = token_weights(counts[kept], aggregation=aggregation, max_length=9)
    assert torch.equal(masked[mask], alone)
    assert not masked[~mask].any()


def test_the_weights_by_hand() -> None:
    lengths = torch.tensor([1, 3])
    assert token_weights(lengths).tolist() == [0.25] * 4
    by_sequence = token_weights(lengths, aggregation="sequence")
    torch.testing.assert_close(by_sequence, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))
    fixed = token_weights(lengths, aggregation="fixed", max_length=5)
    torch.testing.assert_close(fixed, torch.full((4,), 0.1))
