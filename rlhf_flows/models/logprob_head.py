"""Logprobs of chosen tokens from hidden states, without ever holding more logits than needed.

The decision here: one autograd function from hidden states to logprobs. It keeps log-sum-exps in
place of log-softmaxes (one [U, V] array less), forms the gradient of the logits in one pass, works
in chunks of rows so that a large vocabulary does not set the memory, and takes several targets per
row, because the siblings of a prompt all score their first token from one hidden state.

Letters: U rows of hidden states, D width, V vocabulary, T scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ScoredTokens", "selected_logprobs"]

_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits in float32 at a time. On CPU, what a core's cache holds beats what memory could."""
_KEPT_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
"""Logits kept for the backward pass; above it they are computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    logprobs: Tensor
    """[T] float32, with gradient."""
    entropy: Tensor | None
    """[T] float32 of the distribution each token was drawn from, no gradient; None if not asked."""


def selected_logprobs(
    hidden: Tensor,  # [U, D]
    weight: Tensor,  # [V, D] of the language-model head
    rows: Tensor,  # [T] row of `hidden` each token is scored from, ascending
    targets: Tensor,  # [T] token ids
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> ScoredTokens:
    """log softmax(hidden @ weight.T / temperature) at (rows, targets)."""
    assert rows.shape == targets.shape
    # torch leaves `apply` without types.
    function: Any = _SelectedLogprobs
    logprobs, row_entropy = function.apply(hidden, weight, rows, targets, temperature, entropy)
    return ScoredTokens(logprobs=logprobs, entropy=row_entropy[rows] if entropy else None)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        num_rows, vocabulary = hidden.shape[0], weight.shape[0]
        step = max(1, _CHUNK_ELEMENTS.get(device, 2**27) // vocabulary)
        keep = num_rows * vocabulary <= _KEPT_ELEMENTS.get(device, 2**28)
        needs_grad = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        lse = hidden.new_empty(num_rows, dtype=torch.float32)
        chosen = hidden.new_empty(len(rows), dtype=torch.float32)
        spread = hidden.new_zeros(num_rows if entropy else 0, dtype=torch.float32)
        chunks = _chunks(rows, num_rows, step)
        for start, stop, first, last in chunks:
            logits = hidden[start:stop] @ weight.T
            scaled = logits.float()
            if temperature != 1.0:
                scaled = scaled / temperature
            lse[start:stop] = scaled.logsumexp(-1)
            chosen[first:last] = scaled[rows[first:last] - start, targets[first:last]]
            if entropy:
                p = (scaled - lse[start:stop, None]).exp()
                spread[start:stop] = lse[start:stop] - (p * scaled).sum(-1)
            if keep and needs_grad:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, rows, targets, lse, *kept)
        ctx.chunks, ctx.temperature = chunks, temperature
        ctx.mark_non_differentiable(spread)
        return chosen - lse[rows], spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, targets, lse, *kept = ctx.saved_tensors
        temperature: float = ctx.temperature
        grad = grad / temperature if temperature != 1.0 else grad
        total = lse.new_zeros(lse.shape).index_add_(0, rows, grad)  # [U]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over chunks are kept in float32: bfloat16 would round each chunk's share away.
        many = len(ctx.chunks) > 1
        grad_weight: Tensor | None = None
        for i, (start, stop, first, last) in enumerate(ctx.chunks):
            part = hidden[start:stop]
            logits = kept[i] if kept else part @ weight.T
            d = logits.float()
            if temperature != 1.0:
                d = d / temperature
            # d is a fresh tensor unless the model is float32, whose kept logits are used up here.
            d = d.sub_(lse[start:stop, None]).exp_().mul_(-total[start:stop, None])
            d.index_put_(
                (rows[first:last] - start, targets[first:last]), grad[first:last], accumulate=True
            )
            d = d.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(d, weight, out=grad_hidden[start:stop])
            if wants_weight:
                share = d.T @ part
                if grad_weight is None:
                    grad_weight = share.float() if many else share
                else:
                    grad_weight += share
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunks(rows: Tensor, num_rows: int, step: int) -> list[tuple[int, int, int, int]]:
    """(first row, end row, first token, end token) of each chunk; `rows` ascends."""
    starts = list(range(0, num_rows, step))
    if len(starts) == 1:
        return [(0, num_rows, 0, len(rows))]
    bounds = torch.searchsorted(rows, torch.tensor([*starts, num_rows], device=rows.device))
    tokens = bounds.tolist()
    return [
        (start, min(start + step, num_rows), tokens[i], tokens[i + 1])
        for i, start in enumerate(starts)
    ]
