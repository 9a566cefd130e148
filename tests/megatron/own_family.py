"""A family that this package does not know, in one file: as a program would add it, Megatron
included. Seed-OSS: Llama's layers, with biases where queries, keys and values are made.

Imported by ranks; what they check of it are the checks of families that are known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_flows import Family, register_family
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.families.decoder_shapes import megatron_conversion, qwen2_shape
from rlhf_flows.modules.decoder_shape import DecoderShape
from tests.megatron.checks import logits_and_weights
from tests.megatron.scalar_checks import scores_and_weights

__all__ = ["SEED_OSS", "logits_and_weights", "scores_and_weights"]


def seed_oss_shape(config: Any) -> DecoderShape:
    if config.attention_out_bias or config.mlp_bias:
        raise ConfigError(
            "Megatron builds a Seed-OSS with biases of queries, keys and values alone"
        )
    return replace(qwen2_shape(config), qkv_bias=config.attention_bias)


SEED_OSS = register_family(
    Family(
        name="seed_oss",
        causal="SeedOssForCausalLM",
        scalar="SeedOssForSequenceClassification",
        conversions={"megatron": megatron_conversion},
        decoder_shape=seed_oss_shape,
    )
)
