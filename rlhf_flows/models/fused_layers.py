"""RMSNorm, rotary embeddings and SwiGLU with a backward by hand, for supported models' layers.

The decision here: the models stay `transformers`' own, with their parameters, names and numbers;
only these elementwise steps are replaced by those of `rlhf_flows.modules.layer_ops`, on the loaded
instance alone. The formulas are those of the models.

Letters: B rows, L tokens of a row, D width.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf_flows.modules.layer_ops import rms_norm, rotate, swiglu

__all__ = ["fuse_layers"]


def fuse_layers(model: nn.Module) -> None:
    """Puts them in place of what `model`'s norms, attentions and MLPs compute, where known."""
    modules: Any = model.modules()
    for module in modules:
        kind = type(module).__name__
        if kind in _NORMS:
            forward = partial(_norm_forward, eps=module.variance_epsilon, offset=0.0)
            module.forward = MethodType(forward, module)
        elif kind == "GemmaRMSNorm":
            module.forward = MethodType(partial(_norm_forward, eps=module.eps, offset=1.0), module)
        elif kind in _ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)
        elif kind in _MLPS and module.config.hidden_act == "silu" and _is_plain(module):
            module.forward = MethodType(_mlp_forward, module)


_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


_ATTENTIONS = (
    "GemmaAttention",
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
)


_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def _is_plain(mlp: Any) -> bool:
    """Whether its projections are matrices and nothing else."""
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(type(p) is nn.Linear and p.bias is None for p in projections)


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    return swiglu(x, module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)


def _norm_forward(module: Any, x: Tensor, *, eps: float, offset: float) -> Tensor:
    return rms_norm(x, module.weight, eps=eps, offset=offset)


def _attention_forward(
    module: Any,
    hidden_states: Tensor,  # [B, L, D]
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """As the models' own, in the same order; heads stay beside each other for the rotation."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query = module.q_proj(hidden_states).view(shape)
    key = module.k_proj(hidden_states).view(shape)
    value = module.v_proj(hidden_states).view(shape).transpose(1, 2)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query = rotate(query, *position_embeddings).transpose(1, 2)
    key = rotate(key, *position_embeddings).transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    attention: Any = AttentionInterface()[module.config._attn_implementation]
    output, weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", None),
        **options,
    )
    return module.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights
