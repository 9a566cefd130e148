"""How the losses of tokens become the loss of a global batch, as one exact weight per token.

The decision here: the weights are computed once from the whole global batch, so that the loss is
the plain sum of weight x token loss over any cut into micro-batches, however uneven. Averages of
micro-batch averages, the usual way, weigh a token by the company it happens to be in.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Aggregation", "token_weights"]

Aggregation = Literal["token", "sequence", "fixed"]


def token_weights(
    lengths: Tensor,  # [B] response tokens of each sample
    *,
    aggregation: Aggregation = "token",
    max_length: int | None = None,
    mask: Tensor | None = None,  # [T] True where a token is trained; all of them by default
) -> Tensor:  # [T] float32
    """Weights w with loss = (w * token_loss).sum() over the global batch.

    token: 1 / number of trained tokens (DAPO, arXiv 2503.14476, eq. 8).
    sequence: 1 / (number of sequences x trained tokens of the sequence) (GRPO, 2402.03300, eq. 3).
    fixed: 1 / (number of sequences x max_length) (Dr. GRPO, arXiv 2503.20783, section 3.2).
    Sequences are counted if they have a trained token, so masking one equals leaving it out.
    """
    lengths = lengths.to(torch.int64)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # [T]
    trained = torch.ones(len(sample), dtype=torch.bool) if mask is None else mask
    per_sample = torch.bincount(sample[trained], minlength=len(lengths))  # [B]
    num_tokens = int(per_sample.sum())
    if num_tokens == 0:
        return torch.zeros(len(sample))
    if aggregation == "token":
        weights = torch.full((len(sample),), 1.0 / num_tokens, dtype=torch.float64)
    else:
        num_sequences = int((per_sample > 0).sum())
        if aggregation == "sequence":
            each = 1.0 / (num_sequences * per_sample.clamp(min=1).to(torch.float64))
            weights = each[sample]
        else:
            assert max_length is not None, "aggregation='fixed' needs max_length"
            each_token = 1.0 / (num_sequences * max_length)
            weights = torch.full((len(sample),), each_token, dtype=torch.float64)
    return torch.where(trained, weights, 0.0).to(torch.float32)
