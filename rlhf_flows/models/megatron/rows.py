"""A whole batch through a Megatron model without gradient: what `CausalLMModule` and `ScalarModule`
give by their `all_logprobs`, `all_scores` and `all_last_scores`.

The decision here: data parallel ranks share the rows, by the same cut and deal as in training, and
one sum brings all of them to every rank: each has zeros where others have numbers.

Letters: B samples of the batch, r response tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.data.packing import deal
from rlhf_flows.models.causal_lm_module import cut_rows, tokens_of_bins
from rlhf_flows.models.megatron.passes import MegatronPasses

__all__ = ["all_last_scores", "all_logprobs", "all_scores"]


def all_logprobs(
    passes: MegatronPasses, data: Batch, *, temperature: float, micro_batch_tokens: int
) -> list[Tensor]:  # B of [r]
    """Collective: every rank, same order, the same batch. Of the response tokens of all rows, on
    the CPU of every rank; micro-batches are of at most `micro_batch_tokens`.
    """

    def score(parts: Sequence[Batch]) -> list[Tensor]:
        return [s.logprobs for s in passes.response_logprobs(parts, temperature=temperature)]

    lengths = [len(r) for r in data["response_ids"]]
    return _all_rows(data, score, lengths, micro_batch_tokens, passes.model.device)


def all_scores(
    passes: MegatronPasses, data: Batch, *, ends: bool = False, micro_batch_tokens: int
) -> list[Tensor]:  # B of [r], with `ends` [r + 1]
    """As `all_logprobs`, of a model with a scalar head: before each response token of all rows, and
    with `ends` after the last.
    """

    def score(parts: Sequence[Batch]) -> list[Tensor]:
        return passes.response_scores(parts, ends=ends)

    lengths = [len(r) + int(ends) for r in data["response_ids"]]
    return _all_rows(data, score, lengths, micro_batch_tokens, passes.model.device)


def all_last_scores(
    passes: MegatronPasses, data: Batch, *, micro_batch_tokens: int
) -> list[Tensor]:  # B of []
    """As `all_scores`: at the last response token of all rows."""
    lengths = [1] * len(data["response_ids"])
    found = _all_rows(data, passes.last_scores, lengths, micro_batch_tokens, passes.model.device)
    return [row[0] for row in found]


def _all_rows(
    data: Batch,
    score: Callable[[Sequence[Batch]], list[Tensor]],
    lengths: Sequence[int],
    budget: int,
    device: str,
) -> list[Tensor]:
    """What `score` gives for micro-batches, of each row `lengths` numbers, in the rows' order."""
    prompts, responses = list(data["prompt_ids"]), list(data["response_ids"])
    group = parallel_state.get_data_parallel_group()
    bins = cut_rows(prompts, responses, None, budget=budget, multiple=group.size())
    shares = deal(tokens_of_bins(bins, prompts, responses, None), group.size())
    mine = [bins[i] for i in shares[group.rank()]]
    found = torch.zeros(sum(lengths), dtype=torch.float32, device=device)
    rows = found.split(list(lengths))  # views
    parts: list[Batch] = [
        {"prompt_ids": [prompts[i] for i in part], "response_ids": [responses[i] for i in part]}
        for part in mine
    ]
    for part, numbers in zip(mine, score(parts), strict=True):
        pieces = numbers.split([lengths[i] for i in part])
        for i, piece in zip(part, pieces, strict=True):
            rows[i].copy_(piece)
    if group.size() > 1:
        torch.distributed.all_reduce(found, group=group)
    return list(found.cpu().split(list(lengths)))
