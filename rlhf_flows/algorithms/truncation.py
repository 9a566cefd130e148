"""What becomes of completions that the length limit cut off (DAPO, arXiv 2503.14476, section 3.4).

A truncated completion got its reward for something the policy had not finished saying.

Letters: B samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Truncation", "apply_truncation"]

Truncation = Literal["keep", "mask", "penalize"]


def apply_truncation(
    rewards: Tensor,  # [B]
    truncated: Tensor,  # [B] bool
    *,
    kind: Truncation,
    penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:  # rewards [B], trained [B] bool
    """keep: nothing changes. mask: truncated samples stay in their group's mean but leave the
    loss (overlong filtering). penalize: `penalty` is taken off their reward.
    """
    if kind == "mask":
        return rewards, ~truncated
    if kind == "penalize":
        rewards = torch.where(truncated, rewards - penalty, rewards)
    return rewards, torch.ones_like(truncated)
