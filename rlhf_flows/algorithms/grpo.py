"""The clipped policy loss of PPO as GRPO uses it (arXiv 1707.06347, eq. 7; 2402.03300, eq. 3),
with separate bounds below and above (clip-higher: DAPO, arXiv 2503.14476, eq. 10).

Letters: T response tokens, flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PolicyLoss", "policy_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    loss: Tensor
    """[T], with gradient."""
    ratio: Tensor
    """[T], policy over old policy, no gradient."""
    clipped: Tensor
    """[T] bool: the clip took this token's gradient."""


def policy_loss(
    logprobs: Tensor,  # [T] of the policy being trained
    old_logprobs: Tensor,  # [T] when the training phase started; no gradient
    advantages: Tensor,  # [T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(logp - logp_old).

    Where old is the detached policy itself the ratio is 1 and the gradient that of -A logp.
    """
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    with torch.no_grad():
        clipped = ((ratio > 1.0 + clip_high) & (advantages > 0)) | (
            (ratio < 1.0 - clip_low) & (advantages < 0)
        )
    return PolicyLoss(loss=loss, ratio=ratio.detach(), clipped=clipped)
