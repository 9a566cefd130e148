"""RMSNorm, rotary embeddings and SwiGLU with a backward by hand, for supported models' layers.

The decision here: the models stay `transformers`' own, with their parameters, names and numbers;
only these elementwise steps, which cost a third of a small model's training pass on CPU (their
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

__all__ = ["fuse_layers", "rms_norm", "rotate", "swiglu"]


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


def swiglu(
    x: Tensor,  # [..., D]
    gate: Tensor,  # [I, D]
    up: Tensor,  # [I, D]
    down: Tensor,  # [D, I]
) -> Tensor:
    """down (silu(gate x) * (up x)) (arXiv 2002.05202, eq. 6)."""
    function: Any = _SwiGLU
    output: Tensor = function.apply(x, gate, up, down)
    return output


_CHUNK_ELEMENTS = 2**17
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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        keep = any(ctx.needs_input_grad)
        g, u = (rows.new_empty(rows.shape[0], gate.shape[0]) if keep else None for _ in range(2))
        for part in _blocks(rows, gate.shape[0]):
            own_g = torch.mm(rows[part], gate.T, out=None if g is None else g[part])
            own_u = torch.mm(rows[part], up.T, out=None if u is None else u[part])
            h = torch.empty_like(own_g) if keep else own_u
            for few in _chunks(own_g):
                torch.mul(nn.functional.silu(own_g[few].float()), own_u[few], out=h[few])
            torch.mm(h, down.T, out=out[part])
        ctx.save_for_backward(rows, gate, up, down, g, u)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, gate, up, down, g, u = ctx.saved_tensors
        grad_rows = grad.reshape(rows.shape)
        out = torch.empty_like(rows)
        sums = [_Sum(w) for w in (gate, up, down)]
        for part in _blocks(rows, gate.shape[0]):
            own_g, own_u, own_grad = g[part], u[part], grad_rows[part]
            d = own_grad @ down
            d_gate, d_up, h = (torch.empty_like(d) for _ in range(3))
            for few in _chunks(d):
                a, b, e = own_g[few].float(), own_u[few], d[few].float()
                s = torch.sigmoid(a)
                silu = a.mul_(s)
                torch.mul(silu, b, out=h[few])
                torch.mul(silu, e, out=d_up[few])
                # silu' = s + silu (1 - s)
                slope = torch.addcmul(s, silu, 1.0 - s).mul_(e)
                torch.mul(slope, b, out=d_gate[few])
            for total, left, right in zip(
                sums, (d_gate, d_up, own_grad), (rows[part], rows[part], h), strict=True
            ):
                total.add(left, right)
            torch.mm(d_gate, gate, out=out[part])
            out[part].addmm_(d_up, up)
        return out.view(grad.shape), *(total.sum for total in sums)


class _Sum:
    """The sum of products left.T @ right over blocks of rows, in float32 between blocks."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        if self._sum is None:
            self._sum = left.T @ right
        elif self._sum.dtype == left.dtype == torch.float32:
            self._sum.addmm_(left.T, right)
        else:
            self._sum = self._sum.float().add_(left.T @ right)

    @property
    def sum(self) -> Tensor:
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


_BLOCK_ROWS = 512
"""Fewer make poor matrix products."""


def _blocks(rows: Tensor, inner: int) -> list[slice]:
    """Rows whose inner activations stay in a core's cache, where those are not too few."""
    step = 2 * _CHUNK_ELEMENTS // inner
    if rows.device.type != "cpu" or step < _BLOCK_ROWS:
        return [slice(0, rows.shape[0])]
    return [slice(i, i + step) for i in range(0, rows.shape[0], step)]


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
