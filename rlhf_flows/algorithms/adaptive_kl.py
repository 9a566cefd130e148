"""The KL penalty that looks for its own weight (Ziegler et al., arXiv 1909.08593, section 2.2)."""

from __future__ import annotations

__all__ = ["adapted_kl_coef"]

_MOST_ERROR = 0.2


def adapted_kl_coef(
    coef: float, *, kl: float, num_samples: int, target: float, horizon: float
) -> float:
    """coef * (1 + e * num_samples / horizon), e = clip(kl / target - 1, -0.2, 0.2).

    Args:
        coef: What the samples were penalized with.
        kl: Mean over samples of the divergence from the reference, summed over a sample's tokens.
        horizon: Samples within which the coefficient can change by a factor of about e^0.2.
    """
    error = min(max(kl / target - 1.0, -_MOST_ERROR), _MOST_ERROR)
    # Never below zero, however few the samples of the horizon: a penalty is no prize.
    return coef * max(1.0 + error * num_samples / horizon, 0.0)
