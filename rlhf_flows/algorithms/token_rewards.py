"""The reward of each token, with the KL to the reference in it (arXiv 1909.08593, eq. 2;
InstructGPT: arXiv 2203.02155, eq. 2, without its pretraining term).

The decision here: the policy that the KL is of is the one that sampled, so that the rewards of an
episode are fixed before its first update, as PPO asks.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_flows.algorithms.gae import check_tokens
from rlhf_flows.algorithms.kl import KLEstimator, kl_estimate
from rlhf_flows.errors import DataError

__all__ = ["token_rewards"]


def token_rewards(
    scores: Tensor,  # [B] of whole samples
    behaviour_logprobs: Tensor,  # [T] of the sampler while sampling
    reference_logprobs: Tensor,  # [T] of the frozen reference
    lengths: Tensor,  # [B] response tokens of each sample
    *,
    kl_coef: float,
    kl_estimator: KLEstimator = "k1",
    score_clip: float | None = None,
) -> Tensor:  # [T] in the dtype of `behaviour_logprobs`, no gradient
    """-kl_coef * kl of each token, plus the score on a sample's last token.

    `score_clip` bounds scores to [-score_clip, score_clip] first. With k1, the rewards of a sample
    sum to score - kl_coef * log(policy / reference), as in the papers.

    Raises DataError naming the row where a score or a logprob is not finite, or which has no token.
    """
    check_tokens("behaviour logprob", behaviour_logprobs, lengths)
    check_tokens("reference logprob", reference_logprobs, lengths)
    bad = (~torch.isfinite(scores.detach())).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"the score of row {row} is {float(scores[row])}, which no advantage can be computed"
            " from: let the reward module return a finite number"
        )
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise DataError(
            f"row {int(empty[0])} has no response token, so its score has no place to stand: let"
            " the policy end a completion with a token of its own"
        )
    policy = behaviour_logprobs.detach().to(torch.float64)
    kl = kl_estimate(policy, reference_logprobs.detach().to(torch.float64), kind=kl_estimator)
    rewards = -kl_coef * kl
    bounded = scores.detach().to(torch.float64)
    if score_clip is not None:
        bounded = bounded.clamp(-score_clip, score_clip)
    last = lengths.to(torch.int64).cumsum(0) - 1  # [B]
    return rewards.index_add(0, last, bounded).to(behaviour_logprobs.dtype)
