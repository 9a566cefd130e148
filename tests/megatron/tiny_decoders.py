"""Tiny models of each kind that Megatron builds, whose heads, groups and layers divide by two and
four: what topologies are tried on.
"""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama, biases, tied": ("LlamaForCausalLM", {**SIZES, **BIASES, "tie_word_embeddings": True}),
    "llama 3 positions": ("LlamaForCausalLM", {**SIZES, "rope_parameters": ROPE3}),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen2, tied": ("Qwen2ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "qwen2, windows in some layers": ("Qwen2ForCausalLM", {**SIZES, **MIXED_WINDOWS}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "tie_word_embeddings": False}),
    "qwen3, tied": ("Qwen3ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "mistral, window": ("MistralForCausalLM", {**SIZES, "sliding_window": 8}),
    "gemma": ("GemmaForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "gemma, own head": ("GemmaForCausalLM", {**SIZES, "tie_word_embeddings": False}),
}
"""By a name that begins with the family's: its causal class and its configuration."""
