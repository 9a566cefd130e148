"""Supervised fine-tuning: the negative log-likelihood of each demonstrated token.

loss = -(1/N) sum of log p(y_t | x, y_<t) over the N completion tokens (InstructGPT, arXiv
2203.02155, section 3.5); the mean is `aggregation.token_weights`, so that cuts do not matter.

Letters: T completion tokens.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["nll"]


def nll(logprobs: Tensor) -> Tensor:  # [T] -> [T]
    """The loss of each token, from the logprobs of the demonstrated tokens."""
    return -logprobs
