"""From a configuration of `transformers` to a `DecoderShape`: what Megatron is to build.

The decision here: what this package's Megatron layers do not compute is refused by its name in the
configuration, never left out; a model that is nearly the right one trains without a complaint.
"""

from __future__ import annotations

from typing import Any

import torch

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.decoder_shape import Activation, DecoderShape
from rlhf_flows.modules.megatron.conversion import MegatronConversion

__all__ = ["gemma_shape", "llama_shape", "megatron_conversion", "qwen2_shape", "qwen3_shape"]

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FIXED_FREQUENCIES = ("llama3", "linear")
"""Kinds of rotary positions whose frequencies are the same for texts of any length."""


def llama_shape(config: Any) -> DecoderShape:
    """Also Mistral's: they differ in biases and windows, which the configuration tells."""
    attention = bool(getattr(config, "attention_bias", False))
    mlp = bool(getattr(config, "mlp_bias", False))
    if attention != mlp:
        raise _refused(
            config, f"attention_bias={attention} beside mlp_bias={mlp}", "both, or neither"
        )
    return _shape(config, all_biases=attention)


def qwen2_shape(config: Any) -> DecoderShape:
    return _shape(config, qkv_bias=True)


def qwen3_shape(config: Any) -> DecoderShape:
    if config.attention_bias:
        raise _refused(config, "attention_bias=True", "attention_bias=False")
    return _shape(config, qk_norm=True)


def gemma_shape(config: Any) -> DecoderShape:
    for name in ("attention_bias", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise _refused(config, f"{name}=True", f"{name}=False")
    return _shape(config, zero_centered_norms=True, embedding_scale=config.hidden_size**0.5)


def megatron_conversion(config: Any, *, tensor_parallel: int = 1) -> MegatronConversion:
    """For the families of this file; as `Family.conversions["megatron"]`."""
    # Packing needs the sizes of attention alone, which all of them tell alike.
    return MegatronConversion(_shape(config), tensor_parallel=tensor_parallel)


def _shape(config: Any, **peculiar: Any) -> DecoderShape:
    if config.hidden_act not in _ACTIVATIONS:
        raise _refused(config, f"hidden_act={config.hidden_act!r}", f"one of {[*_ACTIVATIONS]}")
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_groups=config.num_key_value_heads,
        head_width=_head_width(config),
        mlp_width=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=_ACTIVATIONS[config.hidden_act],
        rotary_frequencies=_rotary_frequencies(config),
        tied=config.tie_word_embeddings,
        padding_token=config.pad_token_id,
        windows=_windows(config),
        **peculiar,
    )


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotary_frequencies(config: Any) -> tuple[float, ...]:
    """arXiv 2104.09864, eq. 15, and what a configuration makes of it."""
    rotary = config.rope_parameters
    kind, part = rotary["rope_type"], rotary.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise _refused(config, f"partial_rotary_factor={part}", "1.0")
    if kind == "default":
        width = _head_width(config)
        halves = torch.arange(0, width, 2, dtype=torch.float) / width
        frequencies = 1.0 / rotary["rope_theta"] ** halves
    elif kind in _FIXED_FREQUENCIES:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        assert scaling == 1.0
    else:
        raise _refused(config, f"rope_type={kind!r}", f"one of {['default', *_FIXED_FREQUENCIES]}")
    return tuple(frequencies.tolist())


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * int(config.num_hidden_layers)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise _refused(config, f"layers of {sorted(unknown)}", "full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _refused(config: Any, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"Megatron cannot build this {config.model_type} here: it has {found}, expected {expected}."
        " Train it with the torch modules"
    )
