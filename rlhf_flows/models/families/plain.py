"""Families that take no more than names: decoders with rotary positions, attention through
`transformers`' interface, and weights that run as they are stored.

Sliding windows (Mistral, some Qwen2) are read from a model's configuration where they matter.
"""

from __future__ import annotations

from rlhf_flows.models.families.family import Family

__all__ = ["GEMMA", "LLAMA", "MISTRAL", "QWEN2", "QWEN3"]


def _plain(name: str, prefix: str) -> Family:
    return Family(
        name=name, causal=f"{prefix}ForCausalLM", scalar=f"{prefix}ForSequenceClassification"
    )


GEMMA = _plain("gemma", "Gemma")
LLAMA = _plain("llama", "Llama")
MISTRAL = _plain("mistral", "Mistral")
QWEN2 = _plain("qwen2", "Qwen2")
QWEN3 = _plain("qwen3", "Qwen3")
