"""Running mean and standard deviation of returns, by which a value function learns numbers near one
(PopArt: van Hasselt et al., arXiv 1602.07714, section 2; as in ReaL: Mei et al., arXiv 2406.14088).

The decision here: three sums in float64, [1] each, are all there is, and they are changed in place,
so that whoever holds them (an export, a checkpoint) holds the statistics. Unlike in PopArt nothing
is done to the model when they move: the heads that we train have no bias.

Letters: T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["RunningMoments", "ValueNorm", "denormalized"]

ValueNorm = Literal["none", "exp", "ma"]


class RunningMoments:
    """With m and s the mean of a batch's values and of their squares, n their number:

    exp: M = beta M + (1 - beta) m, S likewise with s, W = beta W + (1 - beta) from zero. M / W is
    without the bias of its start (Adam's correction, arXiv 1412.6980, section 3).
    ma: M = M + n m, S = S + n s, W = W + n: the moments of every value ever seen.

    mean = M / W, std = sqrt(max(S / W - mean^2, 0) + eps); 0 and 1 before anything was seen.
    """

    def __init__(
        self, kind: Literal["exp", "ma"], *, beta: float = 0.99995, eps: float = 1e-5
    ) -> None:
        self.kind, self.beta, self.eps = kind, beta, eps
        self.total = torch.zeros(1, dtype=torch.float64)  # M
        self.total_square = torch.zeros(1, dtype=torch.float64)  # S
        self.weight = torch.zeros(1, dtype=torch.float64)  # W
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.std = torch.ones(1, dtype=torch.float64)

    def update(self, values: Tensor) -> None:  # [T]
        """Takes in the values of a whole global batch; nothing where there are none."""
        x = values.detach().to(torch.float64).cpu()
        if len(x) == 0:
            return
        keep, new = (self.beta, 1.0 - self.beta) if self.kind == "exp" else (1.0, float(len(x)))
        self.total.mul_(keep).add_(new * x.mean())
        self.total_square.mul_(keep).add_(new * (x**2).mean())
        self.weight.mul_(keep).add_(new)
        self.mean.copy_(self.total / self.weight)
        variance = (self.total_square / self.weight - self.mean**2).clamp(min=0.0)
        self.std.copy_((variance + self.eps).sqrt())

    def normalized(self, values: Tensor) -> Tensor:  # [T], in its dtype
        """(values - mean) / std."""
        mean, std = self.mean.to(values.device), self.std.to(values.device)
        return ((values.to(torch.float64) - mean) / std).to(values.dtype)


def denormalized(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:  # [T], [1], [1] -> [T]
    """values * std + mean: back on the scale of returns, in the dtype of `values`."""
    scaled = values.to(torch.float64) * std.to(values.device) + mean.to(values.device)
    return scaled.to(values.dtype)
