"""The work that both sides do. Imports neither of them.

One step: 64 prompts x 8 samples x exactly 32 new tokens at temperature 1, the reference's logprobs,
one AdamW step on the GRPO loss with a KL term, mean over sequences of their means over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Dtype", "Work", "digit_share"]

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a side is to do; each field is an option of its command line."""

    model: str
    """Folder of model and tokenizer."""
    prompts: str
    """JSONL file; step i takes rows 64 i to 64 i + 63, from the start again after the last."""
    dtype: Dtype = "float32"
    """Of the weights, what is computed with them, and the optimizer's moments: on both sides."""
    prompts_per_step: int = 64
    samples: int = 8
    new_tokens: int = 32
    warmup: int = 1
    """Steps before the clock starts."""
    steps: int = 3
    learning_rate: float = 1e-4
    kl_coef: float = 0.04
    max_grad_norm: float = 1.0
    seed: int = 7
    threads: int = 2
    save_interval: int = 1
    """Steps between full checkpoints (ours; TRL saves none)."""
    samplers: int = 1
    """Replicas that sample, one thread each; an episode has as many shards (ours)."""
    micro_batch: int = 64
    """Sequences of one pass (TRL; ours cuts by tokens)."""

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples


def digit_share(completion: str) -> float:
    """The reward: which part of the completion's characters are digits.

    A model of random weights gives it a spread, so advantages are not zero, and it can be learned.
    """
    return sum(c.isdigit() for c in completion) / max(1, len(completion))
