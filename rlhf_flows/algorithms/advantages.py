"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2).

The decision here: computed in float64 on the whole global batch, so that the advantages of a group
sum to zero to rounding, and siblings of equal rewards get exactly zero.

Letters: B samples, G groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_flows.errors import DataError

__all__ = ["Normalize", "group_advantages"]

Normalize = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor,  # [B]
    groups: Tensor,  # [B] integers, any order
    *,
    normalize: Normalize = "group",
    eps: float = 1e-4,
) -> Tensor:  # [B] float32
    """A_i = (r_i - mean of its group) / (std + eps).

    `normalize` says which standard deviation (with Bessel's correction): of the group (GRPO,
    2402.03300), of all rewards in the batch, or none at all, which leaves r_i - mean (Dr. GRPO,
    arXiv 2503.20783, eq. 3). A group of one sample, or of equal rewards, has advantage zero.

    Raises DataError where a reward is not finite.
    """
    r = rewards.detach().to(torch.float64)
    bad = (~torch.isfinite(r)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"the reward of row {i} is {float(r[i])}, which no advantage can be computed from:"
            " let the reward function return a finite number"
        )
    if len(r) == 0:
        return r.to(torch.float32)
    _, member = torch.unique(groups, return_inverse=True)  # [B] in 0..G-1
    num_groups = int(member.max()) + 1
    count = torch.bincount(member, minlength=num_groups)  # [G]
    mean = r.new_zeros(num_groups).index_add(0, member, r) / count
    low = r.new_zeros(num_groups).scatter_reduce(0, member, r, "amin", include_self=False)
    high = r.new_zeros(num_groups).scatter_reduce(0, member, r, "amax", include_self=False)
    # The mean of equal numbers may differ from them by rounding: such groups are exactly zero.
    centred = torch.where((low == high)[member], 0.0, r - mean[member])
    if normalize == "group":
        square = r.new_zeros(num_groups).index_add(0, member, centred**2)
        std = (square / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std[member] + eps)
    elif normalize == "batch":
        std = r.std() if len(r) > 1 else r.new_zeros(())
        centred = centred / (std + eps)
    return centred.to(torch.float32)
