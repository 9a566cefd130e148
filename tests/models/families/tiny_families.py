"""A tiny folder of each kind of model that the families have, built locally.

Sizes are small, weights are large: next tokens are far from equally likely, so that a difference in
the computation shows. Heads are 32 wide, which vLLM takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf_flows.models.tiny import character_tokenizer

MAX_TOKENS = 64
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_TOKENS,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": MAX_TOKENS}

MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", SIZES),
    "gemma, own head": ("GemmaForCausalLM", {**SIZES, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "gpt2, own head": ("GPT2LMHeadModel", {**GPT2_SIZES, "tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", SIZES),
    "llama, biases, tied": (
        "LlamaForCausalLM",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": None}),
    "mistral, window": ("MistralForCausalLM", {**SIZES, "sliding_window": 16}),
    "mixtral": ("MixtralForCausalLM", {**SIZES, **EXPERTS, "router_jitter_noise": 0.1}),
    "mixtral, window, tied": (
        "MixtralForCausalLM",
        {**SIZES, **EXPERTS, "sliding_window": 16, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "qwen2, windows in some layers": ("Qwen2ForCausalLM", {**SIZES, **MIXED_WINDOWS}),
    "qwen3": ("Qwen3ForCausalLM", SIZES),
}
"""By a name that begins with the family's: its causal class and its configuration."""


def build(folder: Path, architecture: str, sizes: dict[str, Any]) -> Path:
    """Writes model and tokenizer; the same call writes the same bytes."""
    tokenizer = character_tokenizer()
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(
        vocab_size=len(tokenizer),
        initializer_range=0.15,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():  # biases and norms, too, are to matter
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
