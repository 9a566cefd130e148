"""GPT-2: positions are rows of a table, so no text is longer than it.

Its linear layers keep their matrices transposed ([in, out]), in the running model and in
checkpoints alike.
"""

from __future__ import annotations

from rlhf_flows.models.families.family import Family

__all__ = ["GPT2"]

GPT2 = Family(
    name="gpt2",
    causal="GPT2LMHeadModel",
    scalar="GPT2ForSequenceClassification",
    learned_positions=True,
)
