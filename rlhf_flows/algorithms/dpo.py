"""Losses on pairs of completions without a reward model: DPO (arXiv 2305.18290, eq. 7), with label
smoothing (Mitchell, "A note on DPO with noisy preferences", 2023: cDPO), and IPO (arXiv 2310.12036,
eq. 17).

The decision here: logprobs are sums over the tokens of a completion, in IPO as well, as both papers
have it; nothing is divided by a length.

Letters: B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_flows.errors import DataError

__all__ = ["PairKind", "PairLoss", "check_pairs", "dpo_loss"]

PairKind = Literal["dpo", "ipo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    loss: Tensor
    """[B], with gradient."""
    chosen_rewards: Tensor
    """[B] implicit rewards beta * log(policy / reference), no gradient."""
    rejected_rewards: Tensor
    """[B]"""


def dpo_loss(
    chosen: Tensor,  # [B] logprob of the better completion under the policy
    rejected: Tensor,  # [B] of the worse one
    reference_chosen: Tensor,  # [B] the same under the reference; no gradient
    reference_rejected: Tensor,  # [B]
    *,
    beta: float = 0.1,
    kind: PairKind = "dpo",
    label_smoothing: float = 0.0,
) -> PairLoss:
    """With h = log(policy / reference) of chosen minus that of rejected:

    dpo: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), where s = `label_smoothing` is the
    probability that a label is wrong.
    ipo: (h - 1 / (2 beta))^2, where beta is the paper's tau.

    Raises DataError naming the pair where a logprob is not finite.
    """
    check_pairs("chosen logprob", chosen)
    check_pairs("rejected logprob", rejected)
    check_pairs("reference's chosen logprob", reference_chosen)
    check_pairs("reference's rejected logprob", reference_rejected)
    better, worse = chosen - reference_chosen, rejected - reference_rejected
    h = better - worse
    if kind == "ipo":
        loss = (h - 1.0 / (2.0 * beta)) ** 2
    else:
        right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
        loss = (1.0 - label_smoothing) * right + label_smoothing * wrong
    return PairLoss(
        loss=loss,
        chosen_rewards=beta * better.detach(),
        rejected_rewards=beta * worse.detach(),
    )


def check_pairs(what: str, values: Tensor) -> None:  # [B]
    """Raises DataError naming the first pair whose value is not finite."""
    bad = (~torch.isfinite(values.detach())).nonzero()
    if len(bad):
        pair = int(bad[0])
        raise DataError(
            f"the {what} of pair {pair} is {float(values.detach()[pair])}, which nothing can be"
            " learned from: look at the module that makes it"
        )
