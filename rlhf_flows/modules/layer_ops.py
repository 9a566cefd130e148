"""RMSNorm, rotary embeddings and gated activations with a backward by hand, in torch alone.

The decision here: on CPU these elementwise steps cost a third of a small model's training pass,
because autograd makes some twenty passes over memory for a norm; so they work in chunks that a core
keeps in its cache, float32 inside, rounded once at the end. On CUDA a chunk is everything and a
float32 temporary is what costs, so there torch's own kernels do the same in the weights' dtype,
float32 inside each kernel. What both devices save for the backward pass is the same. Used by the
layers of both `transformers` (models/fused_layers.py) and Megatron (megatron/layers.py).

Letters: N tokens, D width, H heads, d head width, I columns of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["gated", "rms_norm", "rotate", "swiglu"]


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    *,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) (arXiv 1910.07467, eq. 4)."""
    if _at_once(x):
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)
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


Activation = Literal["silu", "gelu_tanh"]


def gated(x: Tensor, activation: Activation = "silu") -> Tensor:  # [..., 2 I] -> [..., I]
    """activation(first half) * second half (arXiv 2002.05202): gate and up projection in one."""
    function: Any = _Gated
    output: Tensor = function.apply(x, activation)
    return output


_CHUNK_ELEMENTS = 2**17
"""Of a float32 temporary on CPU: it stays in a core's cache, and its memory is used again."""


def _at_once(x: Tensor) -> bool:
    """Whether all rows are computed together, by torch's own kernels."""
    return x.is_cuda


def _chunks(rows: Tensor) -> list[slice]:
    count, width = rows.shape
    step = max(1, count if _at_once(rows) else _CHUNK_ELEMENTS // width)
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


_FORWARD: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_BACKWARD: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows.shape[1] // 2
        out = rows.new_empty(rows.shape[0], inner)
        for part in _chunks(out):
            gate, up = rows[part].split(inner, dim=1)
            torch.mul(_FORWARD[activation](_wide(gate)), up, out=out[part])
        ctx.save_for_backward(rows)
        ctx.activation = activation
        return out.view(*x.shape[:-1], inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        inner = rows.shape[1] // 2
        grad_rows = grad.reshape(-1, inner)
        # Both halves in one: two gradients would be copied together after.
        out = torch.empty_like(rows)
        for part in _chunks(grad_rows):
            gate, up = rows[part].split(inner, dim=1)
            d_gate, d_up = out[part].split(inner, dim=1)
            gate, d = _wide(gate), _wide(grad_rows[part])
            torch.mul(_FORWARD[ctx.activation](gate), d, out=d_up)
            d_gate.copy_(_BACKWARD[ctx.activation](d * up, gate))
        return out.view(*grad.shape[:-1], 2 * inner), None


def _wide(x: Tensor) -> Tensor:
    """What to compute with: CUDA's kernels are float32 inside anyway."""
    return x if _at_once(x) else x.float()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if _at_once(x):
            gates, ups = rows @ gate.T, rows @ up.T
            ctx.save_for_backward(rows, gate, up, down, gates, ups)
            return (F.silu(gates).mul_(ups) @ down.T).view(x.shape)
        out = torch.empty_like(rows)
        keep = any(ctx.needs_input_grad)
        g, u = (rows.new_empty(rows.shape[0], gate.shape[0]) if keep else None for _ in range(2))
        for part in _blocks(rows, gate.shape[0]):
            own_g = torch.mm(rows[part], gate.T, out=None if g is None else g[part])
            own_u = torch.mm(rows[part], up.T, out=None if u is None else u[part])
            h = torch.empty_like(own_g) if keep else own_u
            for few in _chunks(own_g):
                torch.mul(F.silu(own_g[few].float()), own_u[few], out=h[few])
            torch.mm(h, down.T, out=out[part])
        ctx.save_for_backward(rows, gate, up, down, g, u)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, gate, up, down, g, u = ctx.saved_tensors
        grad_rows = grad.reshape(rows.shape)
        if _at_once(grad):
            whole = _swiglu_gradients(grad_rows, rows, gate, up, down, g, u)
            return whole[0].view(grad.shape), *whole[1:]
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


def _swiglu_gradients(
    grad: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, g: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows and the three matrices, all rows at once."""
    d = grad @ down
    silu = F.silu(g)
    d_down = grad.T @ (silu * u)
    d_up = silu.mul_(d)
    d_gate = torch.ops.aten.silu_backward(d.mul_(u), g)
    return torch.addmm(d_gate @ gate, d_up, up), d_gate.T @ rows, d_up.T @ rows, d_down


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
    if _at_once(rows) or step < _BLOCK_ROWS:
        return [slice(0, rows.shape[0])]
    return [slice(i, i + step) for i in range(0, rows.shape[0], step)]
