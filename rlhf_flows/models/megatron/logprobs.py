"""Logprobs of chosen tokens where the ranks of a tensor parallel group share the vocabulary.

The decision here: as `logprob_head`, one autograd function from hidden states to logprobs that
works in chunks of rows, and one exchange of three numbers a token at its end, whatever the number
of chunks: what each rank's part of the vocabulary adds up to. Logits are gathered nowhere. Rows of
the padded vocabulary have no logits at all, so no mask is needed. Nothing that is kept for the
backward pass is written to.

Letters: U scored tokens, D width, v tokens of the vocabulary that this rank has, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_flows.models.logprob_head import ScoredTokens

__all__ = ["vocabulary_parallel_logprobs"]

_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits in float32 at a time."""


def vocabulary_parallel_logprobs(
    hidden: Tensor,  # [U, D]
    weight: Tensor,  # [at least v, D]: this rank's rows of the head, padding last
    targets: Tensor,  # [U] token ids
    *,
    vocabulary_size: int,
    group: Any = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> ScoredTokens:
    """Collective over `group`, forward only. log softmax(hidden @ head.T / temperature) at targets.

    All ranks have the same `hidden` and `targets`, and get the same answer. The gradient of
    `hidden` is this rank's share of it: sum it over the group, as Megatron's mappings do in their
    backward pass. Without a group `weight` is the whole head.
    """
    rank = 0 if group is None else group.rank()
    start = rank * len(weight)
    own = min(max(vocabulary_size - start, 0), len(weight))
    function: Any = _VocabularyParallel
    logprobs, spread = function.apply(
        hidden, weight, targets, start, own, group, temperature, entropy
    )
    return ScoredTokens(logprobs=logprobs, entropy=spread if entropy else None)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        start: int,
        own: int,
        group: Any,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        step = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**27) // max(1, own))
        head = weight[:own]
        places = targets - start
        is_here = (places >= 0) & (places < own)
        # Of this rank's part of the vocabulary: log-sum-exp, mean logit, logit of the target.
        sums = hidden.new_zeros(3, len(hidden), dtype=torch.float32)  # [3, U]
        for first in range(0, len(hidden), step):
            rows = slice(first, first + step)
            scaled = _scaled_logits(hidden[rows], head, temperature)  # [u, v]
            sums[0, rows] = lse = scaled.logsumexp(-1)
            if entropy and own:
                sums[1, rows] = ((scaled - lse[:, None]).exp() * scaled).sum(-1)
            if own:
                chosen = scaled.gather(1, places[rows].clamp(0, own - 1)[:, None])[:, 0]
                sums[2, rows] = chosen.where(is_here[rows], 0.0)
        lse, mean, chosen = _joined(sums, group)
        ctx.save_for_backward(hidden, weight, places, is_here, lse)
        ctx.step, ctx.own, ctx.temperature = step, own, temperature
        spread = lse - mean
        ctx.mark_non_differentiable(spread)
        return chosen - lse, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, places, is_here, lse = ctx.saved_tensors
        own, step, temperature = ctx.own, ctx.step, ctx.temperature
        grad = grad / temperature
        head = weight[:own]
        grad_hidden = torch.zeros_like(hidden)
        # In float32, for bfloat16 would round away what a chunk adds.
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for first in range(0, len(hidden) if own else 0, step):
            rows = slice(first, first + step)
            part, share = hidden[rows], grad[rows]
            scaled = _scaled_logits(part, head, temperature)
            d = (scaled - lse[rows, None]).exp_() * -share[:, None]  # [u, v]
            hits = is_here[rows].nonzero()[:, 0]
            d[hits, places[rows][hits]] += share[hits]
            d = d.to(weight.dtype)
            torch.mm(d, head, out=grad_hidden[rows])
            grad_head += d.T @ part
        grad_weight = torch.zeros_like(weight)
        grad_weight[:own] = grad_head
        return grad_hidden, grad_weight, *([None] * 6)


def _scaled_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ head.T).float()
    return logits if temperature == 1.0 else logits / temperature


def _joined(sums: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:  # each [U]
    """Log-sum-exp, mean logit under the softmax and target's logit of the whole vocabulary."""
    if group is None or group.size() == 1:
        return sums[0], sums[1], sums[2]
    parts = [torch.empty_like(sums) for _ in range(group.size())]
    torch.distributed.all_gather(parts, sums, group=group)
    every = torch.stack(parts)  # [P, 3, U]
    lse = every[:, 0].logsumexp(0)
    shares = (every[:, 0] - lse).exp()  # of the probability, [P, U]
    return lse, (shares * every[:, 1]).sum(0), every[:, 2].sum(0)
