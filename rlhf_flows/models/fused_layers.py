"""RMSNorm and rotary embeddings with a backward by hand, for the layers of supported models.

The decision here: the models stay `transformers`' own, with their parameters, names and numbers;
only these two elementwise steps, which cost a third of a small model's training pass on CPU (their
autograd makes some twenty passes over memory for a norm), are replaced, on the loaded instance
alone. The formulas are those of the models; float32 inside, rounded once at the end.

Letters: N tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

__all__ = ["fuse_layers", "rms_norm", "rotate"]


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    *,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) (arXiv 1910.07467, eq. 4)."""
    function: Any = _RMSNorm  # torch leaves `apply` without types
    output: Tensor = function.apply(x, weight, eps, offset)
    return output


def rotate(
    x: Tensor,  # [1, N, H, d]
    cos: Tensor,  # [1, N, d]
    sin: Tensor,  # [1, N, d]
) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of halves, as in `transformers`."""
    function: Any = _Rotate
    output: Tensor = function.apply(x, cos, sin)
    return output


_CHUNK_ELEMENTS = 2**18
"""Of a float32 temporary on CPU: it stays in a core's cache, and its memory is used again."""


def _chunks(rows: Tensor) -> list[slice]:
    count, width = rows.shape
    step = count if rows.device.type != "cpu" else max(1, _CHUNK_ELEMENTS // width)
    return [slice(i, i + step) for i in range(0, count, step)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        w = weight.float() + offset
        y = torch.empty_like(rows)
        scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
        for part in _chunks(rows):
            # Converted in a step of its own: mixed types in one product are slow on CPU.
            own = rows[part].float()
            norm = torch.linalg.vector_norm(own, dim=-1, keepdim=True)
            scale[part] = norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
            y[part] = (own * scale[part]).mul_(w)
        ctx.save_for_backward(rows, weight, scale)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        w = weight.float() + ctx.offset
        grad_rows = grad.reshape(rows.shape)
        out = torch.empty_like(rows)
        grad_weight = torch.zeros_like(w)
        for part in _chunks(rows):
            normed, g = rows[part].float() * scale[part], grad_rows[part].float()
            product = normed * g
            grad_weight += product.sum(0)
            along = torch.mv(product, w).div_(rows.shape[-1]).mul_(scale[part, 0])[:, None]
            # scale (g w - normed mean(g w normed)), in the memory of `product`
            d = torch.mul(g, w, out=product).mul_(scale[part])
            out[part] = d.addcmul_(normed, along, value=-1.0)
        return out.view(grad.shape), grad_weight.to(weight.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    # Both halves of an angle's cosine and sine are the same numbers.
    c, s = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, c, out=out[..., :half]).addcmul_(second, s, value=-sign)
    torch.mul(second, c, out=out[..., half:]).addcmul_(first, s, value=sign)
    return out


def fuse_layers(model: nn.Module) -> None:
    """Puts both in place of what `model`'s norms and attentions compute, where they are known."""
    modules: Any = model.modules()
    for module in modules:
        kind = type(module).__name__
        if kind in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            forward = partial(_norm_forward, eps=module.variance_epsilon, offset=0.0)
            module.forward = MethodType(forward, module)
        elif kind == "GemmaRMSNorm":
            module.forward = MethodType(partial(_norm_forward, eps=module.eps, offset=1.0), module)
        elif kind in _ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)


_ATTENTIONS = (
    "GemmaAttention",
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
)


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
