"""The loss of a value function, clipped around its old values (PPO2; Stiennon et al., arXiv
2009.01325, appendix C; written out by Huang et al., "The 37 Implementation Details of PPO", 2022).

Letters: T response tokens, flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ValueLoss", "value_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    loss: Tensor
    """[T], with gradient."""
    clipped: Tensor
    """[T] bool: the clip took this token's gradient."""


def value_loss(
    values: Tensor,  # [T] of the model being trained
    old_values: Tensor,  # [T] when the samples were scored; no gradient
    returns: Tensor,  # [T]
    *,
    clip: float | None = 0.2,
) -> ValueLoss:
    """max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2; without `clip` the first.

    Where both are equal, as inside of the bounds, the gradient is that of (V - R)^2 / 2.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return ValueLoss(loss=0.5 * plain, clipped=torch.zeros_like(values, dtype=torch.bool))
    bounded = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    other = (bounded - returns) ** 2
    clipped = other > plain
    return ValueLoss(loss=0.5 * torch.where(clipped, other, plain), clipped=clipped.detach())
