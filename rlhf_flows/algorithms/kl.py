"""Estimators of KL(policy || reference) from one sampled token (Schulman, "Approximating KL
Divergence", joschu.net/blog/kl-approx.html, 2020).

Letters: T response tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["KLEstimator", "kl_estimate"]

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Tensor,  # [T] of the policy that sampled
    reference_logprobs: Tensor,  # [T] of the reference
    *,
    kind: KLEstimator = "k3",
) -> Tensor:  # [T]
    """With d = logp - logref, per token:

    k1 = d: unbiased, of either sign; as a loss its gradient is zero in expectation.
    k2 = d^2 / 2: biased, small variance; its gradient is that of the KL, in expectation.
    k3 = exp(-d) + d - 1: unbiased, never negative; the one in GRPO (2402.03300, eq. 4).
    """
    d = logprobs - reference_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    # expm1 keeps the digits that exp(-d) - 1 loses where the two policies nearly agree.
    return (-d).expm1() + d
