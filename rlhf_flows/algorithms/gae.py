"""Generalized advantage estimation (GAE, arXiv 1506.02438, eq. 16), and whitening.

The decision here: sequences stay ragged, as flat tensors with lengths; the recursion runs over
places from the end, for all samples at once, in float64. A completion is a whole episode: nothing
comes after its last token, so the value there is zero, unless the caller says what it would be.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_flows.errors import DataError

__all__ = ["Advantages", "check_tokens", "generalized_advantages", "whiten"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    advantages: Tensor
    """[T], no gradient."""
    returns: Tensor
    """[T] advantage + value: what a value function learns (TD(lambda) returns)."""


def generalized_advantages(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T] V of the state before each token
    lengths: Tensor,  # [B] response tokens of each sample
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    end_values: Tensor | None = None,  # [B] V of the state after each sample's last token
) -> Advantages:  # in the dtype of `values`
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    V after the last token is 0, or of `end_values`: that of a completion that was cut off, whose
    end is none (partial-episode bootstrapping: Pardo et al., arXiv 1712.00378).
    lambda_ = 0 gives the TD error delta_t; gamma = lambda_ = 1 the reward to go minus V_t.

    Raises DataError naming the row where a reward or a value is not finite.
    """
    check_tokens("reward", rewards, lengths)
    check_tokens("value", values, lengths)
    lengths = lengths.to(torch.int64)
    r, v = rewards.detach().to(torch.float64), values.detach().to(torch.float64)
    start = lengths.cumsum(0) - lengths  # [B]
    advantages = torch.zeros_like(v)
    later, next_value = v.new_zeros(len(lengths)), v.new_zeros(len(lengths))
    if end_values is not None:
        check_tokens("value at the end", end_values, torch.ones_like(lengths))
        next_value += end_values.detach().to(torch.float64)
    for place in reversed(range(int(lengths.max()) if len(lengths) else 0)):
        rows = (lengths > place).nonzero()[:, 0]
        at = start[rows] + place
        delta = r[at] + gamma * next_value[rows] - v[at]
        later[rows] = delta + gamma * lambda_ * later[rows]
        next_value[rows] = v[at]
        advantages[at] = later[rows]
    return Advantages(
        advantages=advantages.to(values.dtype), returns=(advantages + v).to(values.dtype)
    )


def whiten(
    advantages: Tensor,  # [T] of a whole global batch
    *,
    mask: Tensor | None = None,  # [T] True where a token counts; all of them by default
    eps: float = 1e-8,
) -> Tensor:  # [T]
    """(A - mean) / sqrt(variance + eps), both over the tokens that count; the others get zero.

    The variance has no Bessel's correction. Equal advantages become exactly zero.
    """
    a = advantages.detach().to(torch.float64)
    counts = torch.ones_like(a, dtype=torch.bool) if mask is None else mask
    chosen = a[counts]
    if len(chosen) == 0 or bool((chosen == chosen[0]).all()):
        return torch.zeros_like(advantages)
    variance, mean = torch.var_mean(chosen, correction=0)
    white = (a - mean) / (variance + eps).sqrt()
    return torch.where(counts, white, 0.0).to(advantages.dtype)


def check_tokens(what: str, values: Tensor, lengths: Tensor) -> None:
    """Raises DataError naming row and token of the first of `values` [T] that is not finite."""
    if len(values) != int(lengths.sum()):
        raise DataError(
            f"there are {len(values)} {what}s for {int(lengths.sum())} response tokens: give one"
            " for each token of each sample"
        )
    bad = (~torch.isfinite(values.detach())).nonzero()
    if len(bad):
        at = int(bad[0])
        ends = lengths.to(torch.int64).cumsum(0)
        row = int((ends <= at).sum())
        token = at - (int(ends[row - 1]) if row else 0)
        raise DataError(
            f"the {what} of token {token} of row {row} is {float(values.detach()[at])}, which no"
            " advantage can be computed from: look at the module that makes it"
        )
