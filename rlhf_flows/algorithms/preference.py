"""The loss of a reward model: the Bradley-Terry likelihood of a preference (InstructGPT, arXiv
2203.02155, eq. 1).

Letters: B pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlhf_flows.algorithms.dpo import check_pairs

__all__ = ["preference_loss"]


def preference_loss(
    chosen: Tensor,  # [B] reward of the better completion
    rejected: Tensor,  # [B] of the worse one
    *,
    margin: Tensor | None = None,  # [B]
    center_coef: float = 0.0,
) -> Tensor:  # [B]
    """-log sigmoid(r_chosen - r_rejected - margin) + center_coef * (r_chosen + r_rejected)^2.

    `margin` says how much better the better one is (Llama 2, arXiv 2307.09288, eq. 2). The
    likelihood sees differences alone; the second term keeps rewards near zero (arXiv 2312.09244,
    eq. 2).

    Raises DataError naming the pair where a reward or a margin is not finite.
    """
    check_pairs("chosen reward", chosen)
    check_pairs("rejected reward", rejected)
    distance = chosen - rejected
    if margin is not None:
        check_pairs("margin", margin)
        distance = distance - margin
    loss = -F.logsigmoid(distance)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected) ** 2
    return loss
