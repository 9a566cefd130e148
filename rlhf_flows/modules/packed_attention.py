"""Attention of texts that stand in one row: which kernel, and what is built on it.

Two decisions. On CUDA it is the flash attention that torch itself carries, in its form for texts of
any length, called below autograd: torch's public `varlen_attn` refuses fewer key-value heads than
query heads in some versions, has changed its arguments in each, and drops the gradient of the
log-sum-exp that the shared prefix is joined by. And a response that sees its prompt and itself is
two calls joined by their log-sum-exps, as in ring attention (arXiv 2310.01889): nothing is padded,
no prompt is copied for its siblings, no mask is made. The joined output and log-sum-exp are given
to both backward calls, which makes their gradients those of one softmax.

Elsewhere (CPU, float32, wide or odd heads) there is no such kernel here: `flash_kernel` says None,
and who calls attends text by text.

Letters: T packed tokens, H query heads, G key-value heads, w width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "FlashKernel",
    "Kernel",
    "SharedSpans",
    "Spans",
    "flash_kernel",
    "packed_attention",
    "shared_prefix_attention",
    "spans_of",
]

_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST, _WIDTH_MULTIPLE = 256, 8
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Which of the packed queries see which of the packed keys: each span its own, in order."""

    query_ends: Tensor
    """[1 + spans] int32, from 0; a span may be empty."""
    key_ends: Tensor
    """[1 + spans] int32, from 0; a span is empty only where it has no queries."""
    longest_query: int
    longest_key: int
    is_causal: bool
    """Whether a query sees keys up to its own place only; its span has as many keys."""
    window: int | None = None
    """How many keys a causal query sees, its own counted; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpans:
    """Of a row with all prompts first, then all responses, siblings beside each other."""

    prompts: Spans
    own: Spans
    """Of responses, on themselves; their places are counted from the first response token."""
    seen: Spans
    """Of the responses of each prompt, on the prompt."""


class Kernel(Protocol):
    """Attention of spans, and its gradient, below autograd."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor]:  # [T, H, w], [H, T] float32
        """The output, and the log-sum-exps of the scaled scores."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value where the probabilities are exp(scores - lse)."""


class FlashKernel:
    """torch's flash attention (arXiv 2307.08691) for spans of any length. CUDA only.

    Fewer key-value heads than query heads are its own affair.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *_lengths(spans),
            0.0,
            spans.is_causal,
            False,
            scale=scale,
            **_window(spans),
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The states of dropout, of which there is none.
        nothing = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse,
            *_lengths(spans),
            0.0,
            spans.is_causal,
            nothing,
            unused,
            scale=scale,
            **_window(spans),
        )
        return gradients


def _lengths(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    # The kernel lays one query a span out in another way, which spans that are empty do not fit.
    longest = (max(2, spans.longest_query), max(2, spans.longest_key))
    return spans.query_ends, spans.key_ends, *longest


def _window(spans: Spans) -> dict[str, int]:
    if spans.window is None or spans.longest_query <= spans.window:
        return {}
    return {"window_size_left": spans.window - 1, "window_size_right": 0}


def flash_kernel(
    device: torch.device | str, dtype: torch.dtype, head_width: int
) -> FlashKernel | None:
    """torch's, where it takes heads of this dtype and width on this device; else None."""
    device = torch.device(device)
    if device.type != "cuda" or dtype not in _DTYPES:
        return None
    if head_width > _WIDEST or head_width % _WIDTH_MULTIPLE:
        return None
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return None
    return FlashKernel()


def packed_attention(
    query: Tensor,  # [T, H, w]
    key: Tensor,  # [T, G, w]
    value: Tensor,
    spans: Spans,
    *,
    scale: float,
    kernel: Kernel,
) -> Tensor:  # [T, H, w]
    """softmax(scale query key^T) value over what each query sees, by `kernel`."""
    function: Any = _Packed  # torch leaves `apply` without types
    output: Tensor = function.apply(query, key, value, spans, scale, kernel)
    return output


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Spans,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value, spans, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = spans, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spans, scale, kernel = ctx.call
        return *kernel.backward(grad, *ctx.saved_tensors, spans, scale), None, None, None


def shared_prefix_attention(
    query: Tensor,  # [T, H, w]
    key: Tensor,  # [T, G, w]
    value: Tensor,
    spans: SharedSpans,
    *,
    num_prompt_tokens: int,
    scale: float,
    kernel: Kernel,
) -> Tensor:  # [T, H, w]
    """Prompts on themselves; responses on their prompt and themselves, in one softmax."""
    function: Any = _SharedPrefix
    output: Tensor = function.apply(query, key, value, spans, num_prompt_tokens, scale, kernel)
    return output


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: SharedSpans,
        at: int,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        (q, own_q), (k, own_k), (v, own_v) = _split(at, query, key, value)
        out, lse = kernel.forward(q, k, v, spans.prompts, scale)
        if own_q.shape[0] > 0:
            by_self, self_lse = kernel.forward(own_q, own_k, own_v, spans.own, scale)
            by_prompt, prompt_lse = kernel.forward(own_q, k, v, spans.seen, scale)
            joined = torch.logaddexp(self_lse, prompt_lse)  # [H, T of responses]
            share = (self_lse - joined).exp_().T[:, :, None]
            whole = torch.lerp(by_prompt.to(lse), by_self.to(lse), share).to(out)
            out, lse = torch.cat([out, whole]), torch.cat([lse, joined], dim=1)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = spans, at, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        spans, at, scale, kernel = ctx.call
        (q, own_q), (k, own_k), (v, own_v), (g, own_g), (o, own_o) = _split(
            at, query, key, value, grad, out
        )
        # Of its own, because the kernel reads log-sum-exps as if nothing stood between them.
        lse, own_lse = lse[:, :at].contiguous(), lse[:, at:].contiguous()
        d_q, d_k, d_v = kernel.backward(g, q, k, v, o, lse, spans.prompts, scale)
        if own_q.shape[0] > 0:
            rest = own_o, own_lse
            by_self = kernel.backward(own_g, own_q, own_k, own_v, *rest, spans.own, scale)
            by_prompt = kernel.backward(own_g, own_q, k, v, *rest, spans.seen, scale)
            d_q = torch.cat([d_q, by_self[0] + by_prompt[0]])
            d_k = torch.cat([d_k + by_prompt[1], by_self[1]])
            d_v = torch.cat([d_v + by_prompt[2], by_self[2]])
        return d_q, d_k, d_v, None, None, None, None


def _split(at: int, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:at], x[at:]) for x in tensors]


def spans_of(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    *,
    device: torch.device | str,
    window: int | None = None,
) -> Spans:
    """Of texts that see themselves up to each token; or, with `key_lengths`, all of another."""
    keys = query_lengths if key_lengths is None else key_lengths
    ends = _ends(query_lengths, device)
    return Spans(
        query_ends=ends,
        key_ends=ends if keys is query_lengths else _ends(keys, device),
        longest_query=max(query_lengths, default=0),
        longest_key=max(keys, default=0),
        is_causal=key_lengths is None,
        window=window,
    )


def _ends(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
