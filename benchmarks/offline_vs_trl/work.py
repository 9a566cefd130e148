"""The work that both sides do: supervised training, a reward model, or DPO. Imports neither side.

An episode is a number of optimizer steps on rows in the order of the file. Ours ends it with a
commit; for TRL, which has none, it is where the clock is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Dtype", "Lengths", "What", "Work"]

Dtype = Literal["float32", "bfloat16"]
What = Literal["sft", "reward", "dpo"]
Lengths = Literal["even", "uneven"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a side is to do; each field is an option of its command line."""

    what: What
    model: str
    """Folder of model and tokenizer; for `reward` one with a head of one label."""
    rows: str
    """JSONL file of {prompt, completion} or {prompt, chosen, rejected}; from the start again after
    the last row."""
    dtype: Dtype = "float32"
    """Of the weights, what is computed with them, and the optimizer's moments: on both sides."""
    batch: int = 64
    """Rows of one optimizer step."""
    steps: int = 16
    """Optimizer steps of one episode."""
    warmup: int = 1
    """Episodes before the clock starts."""
    episodes: int = 3
    """Measured."""
    learning_rate: float = 1e-4
    beta: float = 0.1
    """Of DPO."""
    max_grad_norm: float = 1.0
    seed: int = 7
    threads: int = 2
    save_interval: int = 1
    """Episodes between full checkpoints (ours; TRL saves none)."""

    @property
    def rows_per_episode(self) -> int:
        return self.batch * self.steps
