"""Families that take no more than names: decoders with rotary positions, attention through
`transformers`' interface, and weights that run as they are stored. Megatron builds them as well,
and packs their weights.

Sliding windows (Mistral, some Qwen2) are read from a model's configuration where they matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_flows.models.families.decoder_shapes import (
    gemma_shape,
    llama_shape,
    megatron_conversion,
    qwen2_shape,
    qwen3_shape,
)
from rlhf_flows.models.families.family import Family
from rlhf_flows.modules.decoder_shape import DecoderShape

__all__ = ["GEMMA", "LLAMA", "MISTRAL", "QWEN2", "QWEN3"]


def _plain(name: str, prefix: str, decoder_shape: Callable[[Any], DecoderShape]) -> Family:
    return Family(
        name=name,
        causal=f"{prefix}ForCausalLM",
        scalar=f"{prefix}ForSequenceClassification",
        conversions={"megatron": megatron_conversion},
        decoder_shape=decoder_shape,
    )


GEMMA = _plain("gemma", "Gemma", gemma_shape)
LLAMA = _plain("llama", "Llama", llama_shape)
MISTRAL = _plain("mistral", "Mistral", llama_shape)
QWEN2 = _plain("qwen2", "Qwen2", qwen2_shape)
QWEN3 = _plain("qwen3", "Qwen3", qwen3_shape)
