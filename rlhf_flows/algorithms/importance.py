"""Importance weights for the gap between sampler and trainer.

Two programs that hold the same weights do not compute the same logprobs, and samples come from the
sampler's. The weight old/behaviour, truncated from above, corrects the expectation at bounded
variance (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
2025: TIS; truncation: Ionides 2008).

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Importance", "importance_weights"]

Importance = Literal["none", "token", "sequence"]


def importance_weights(
    old_logprobs: Tensor,  # [T] of the trainer's policy at the start of training
    behaviour_logprobs: Tensor,  # [T] of the sampler while sampling
    lengths: Tensor,  # [B] response tokens of each sample
    *,
    kind: Importance,
    cap: float = 2.0,
) -> Tensor:  # [T], no gradient
    """min(exp(old - behaviour), cap), where the difference is a token's or its sequence's sum."""
    if kind == "none":
        return torch.ones_like(old_logprobs)
    gap = (old_logprobs - behaviour_logprobs).detach()
    if kind == "sequence":
        sample = torch.repeat_interleave(
            torch.arange(len(lengths), device=gap.device), lengths.to(gap.device)
        )
        gap = gap.new_zeros(len(lengths)).index_add(0, sample, gap)[sample]
    return gap.exp().clamp(max=cap)
