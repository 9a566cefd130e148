"""Drawing tokens from logits: temperature, min-p, top-k, top-p, in vLLM's order.

The decision here: one uniform number per row and step, turned into a token by the inverse of the
cumulative distribution. All of a row's numbers are drawn at once from its own seed, so a row's luck
does not depend on its batch, and a step costs no loop over rows.

Letters: B rows, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_flows.generation import GenerationSettings

__all__ = ["draw", "processed_logprobs", "row_uniforms"]


def processed_logprobs(
    logits: Tensor,  # [B, V]
    settings: GenerationSettings,
) -> Tensor:  # [B, V], float32
    """Log-probabilities of the distribution that tokens are drawn from.

    Greedy decoding draws from none; its log-probabilities are the model's own.
    """
    logits = logits.float()
    if settings.greedy:
        return logits.log_softmax(-1)
    logits = logits / settings.temperature
    if settings.min_p > 0.0:
        probabilities = logits.softmax(-1)
        least = settings.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        # Dropped while all that is left above them still has probability top_p; never the last.
        drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - settings.top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.log_softmax(-1)


def row_uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """[B, N] float64 in [0, 1): row i from seed i alone."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


def draw(
    logprobs: Tensor,  # [B, V]
    uniforms: Tensor,  # [B]
) -> Tensor:  # [B] int64
    """One token a row, each with its probability; one of probability zero never comes."""
    cumulative = logprobs.double().exp().cumsum(-1)
    targets = uniforms.to(logprobs.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(
        max=logprobs.shape[-1] - 1
    )
