"""Attention of the shared-prefix layout for CPU, as plain matrix products with a backward by hand.

The decision here: on CPU, torch's fused attention is made for long sequences. For the short ones of
most RL work its backward pass costs several times the products it consists of (measured on 128
responses of 31 tokens, forward and backward: 114 ms against 36 ms in bfloat16, 55 against 42 in
float32). Here the siblings of a prompt are one tall matrix against its keys, so the prompt is
neither copied for them nor its gradient summed up afterwards. The price is memory for all
probabilities, so it is taken for batches up to `MAX_SCORES` only. Scores are float32 throughout.

Letters: G prompts, P longest prompt, S siblings, B = G x S responses, R longest response input,
N tokens in the row, H heads, K key-value heads, M = H / K queries per key, d head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from rlhf_flows.models.shared_prefix import SharedPrefixLayout

__all__ = ["MAX_SCORES", "fits", "product_attention"]

MAX_SCORES = 2**24
"""Most probabilities of one layer: 64 MiB, kept until the backward pass."""


def fits(layout: SharedPrefixLayout, num_heads: int) -> bool:
    assert layout.mask is not None
    responses, _, length, seen = layout.mask.shape
    prompts = layout.num_prompts * (seen - length) ** 2
    return num_heads * (responses * length * seen + prompts) <= MAX_SCORES


def product_attention(
    query: Tensor,  # [N, H, d]
    key: Tensor,  # [N, K, d]
    value: Tensor,  # [N, K, d]
    *,
    layout: SharedPrefixLayout,
    scale: float,
) -> Tensor:  # [N, H, d]
    function: Any = _ProductAttention  # torch leaves `apply` without types
    output: Tensor = function.apply(query, key, value, layout, scale)
    return output


class _ProductAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SharedPrefixLayout,
        scale: float,
    ) -> Tensor:
        at = layout.num_prompt_tokens
        assert layout.mask is not None
        heads, kv = query.shape[1], key.shape[1]
        length = layout.mask.shape[2]
        longest = layout.mask.shape[3] - length
        shape = _Shape(layout, heads, kv, query.shape[2])
        q = shape.prompt_queries(query[:at]) * scale  # [G K, M P, d]
        k, v = shape.prompt_keys(key[:at]), shape.prompt_keys(value[:at])  # [G K, P, d]
        p = torch.bmm(q, k.transpose(1, 2))  # [G K, M P, P]
        p.view(-1, longest, longest).add_(_causal(longest))
        p = torch.softmax(p, -1)
        out = torch.bmm(p, v)
        output = torch.empty(query.shape, dtype=query.dtype)
        output[:at] = shape.prompt_tokens(out)
        saved = [q, k, v, p, out]
        if length > 0:
            q = shape.queries(query[at:]) * scale  # [G K, S M R, d]
            own_k, own_v = shape.keys(key[at:]), shape.keys(value[at:])  # [G K S, R, d]
            seen_k, seen_v = shape.for_siblings(k), shape.for_siblings(v)
            on_prompt = torch.bmm(q, seen_k.transpose(1, 2))  # [G K, S M R, P]
            if layout.prompt_pad is not None:
                shape.hide_padding(on_prompt, layout.mask)
            on_self = torch.bmm(shape.each(q), own_k.transpose(1, 2))  # [G K S, M R, R]
            on_self.view(-1, length, length).add_(_causal(length))
            on_self = on_self.view(*on_prompt.shape[:2], length)
            top = torch.maximum(on_prompt.amax(-1, keepdim=True), on_self.amax(-1, keepdim=True))
            on_prompt.sub_(top).exp_()
            on_self.sub_(top).exp_()
            total = on_prompt.sum(-1, keepdim=True).add_(on_self.sum(-1, keepdim=True))
            on_prompt.div_(total)
            on_self.div_(total)
            out = torch.bmm(on_prompt, seen_v)
            shape.each(out).baddbmm_(shape.each(on_self), own_v)
            output[at:] = shape.tokens(out)
            saved += [q, own_k, own_v, on_prompt, on_self, out]
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.scale, ctx.dtype = shape, scale, query.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape: _Shape = ctx.shape
        at = shape.layout.num_prompt_tokens
        q, k, v, p, out, *rest = ctx.saved_tensors
        grad_query = torch.empty(grad.shape, dtype=ctx.dtype)
        grad_key = torch.empty((grad.shape[0], shape.kv, grad.shape[2]), dtype=ctx.dtype)
        grad_value = torch.empty_like(grad_key)

        g = shape.prompt_queries(grad[:at])
        d = _through_softmax(torch.bmm(g, v.transpose(1, 2)), p, g, out)
        grad_query[:at] = shape.prompt_tokens(torch.bmm(d, k).mul_(ctx.scale))
        prompt_k, prompt_v = torch.bmm(d.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), g)
        if rest:
            q, own_k, own_v, on_prompt, on_self, out = rest
            seen_k, seen_v = shape.for_siblings(k), shape.for_siblings(v)
            g = shape.queries(grad[at:])  # [G K, S M R, d]
            each_g, each_q, each_p = shape.each(g), shape.each(q), shape.each(on_self)
            share = (g * out).sum(-1, keepdim=True)
            d = torch.bmm(g, seen_v.transpose(1, 2)).sub_(share).mul_(on_prompt)
            own = torch.bmm(each_g, own_v.transpose(1, 2))
            own = own.view_as(on_self).sub_(share).mul_(on_self)
            own = shape.each(own)
            grad_q = torch.bmm(d, seen_k)
            shape.each(grad_q).baddbmm_(own, own_k)
            grad_query[at:] = shape.tokens(grad_q.mul_(ctx.scale))
            grad_key[at:] = shape.key_tokens(torch.bmm(own.transpose(1, 2), each_q))
            grad_value[at:] = shape.key_tokens(torch.bmm(each_p.transpose(1, 2), each_g))
            prompt_k += shape.over_siblings(torch.bmm(d.transpose(1, 2), q))
            prompt_v += shape.over_siblings(torch.bmm(on_prompt.transpose(1, 2), g))
        grad_key[:at] = shape.prompt_key_tokens(prompt_k)
        grad_value[:at] = shape.prompt_key_tokens(prompt_v)
        return grad_query, grad_key, grad_value, None, None


def _through_softmax(grad: Tensor, p: Tensor, grad_out: Tensor, out: Tensor) -> Tensor:
    """Gradient of the scores: p (dp - sum p dp), where sum p dp = sum of grad_out x out."""
    return grad.sub_((grad_out * out).sum(-1, keepdim=True)).mul_(p)


def _causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu_(1)


class _Shape:
    """Between the row of tokens and the matrices of its parts, in float32.

    Where prompts have unequal numbers of siblings, every response has its own copy of the prompt.
    """

    def __init__(self, layout: SharedPrefixLayout, heads: int, kv: int, width: int) -> None:
        self.layout, self.heads, self.kv, self.width = layout, heads, kv, width
        self.siblings = layout.siblings or 1
        self.groups = layout.num_responses // self.siblings
        self.per_key = heads // kv

    def prompt_queries(self, x: Tensor) -> Tensor:  # [tokens, H, d] -> [G K, M P, d]
        x = _spread(x, self.layout.prompt_pad, self.layout.prompt_unpad).float()
        x = x.view(self.layout.num_prompts, -1, self.kv, self.per_key, self.width)
        x = x.permute(0, 2, 3, 1, 4)
        return x.reshape(x.shape[0] * self.kv, -1, self.width)

    def prompt_tokens(self, x: Tensor) -> Tensor:  # the inverse
        x = x.view(self.layout.num_prompts, self.kv, self.per_key, -1, self.width)
        x = x.permute(0, 3, 1, 2, 4).reshape(-1, self.heads, self.width)
        return _unpadded(x, self.layout.prompt_unpad)

    def prompt_keys(self, x: Tensor) -> Tensor:  # [tokens, K, d] -> [G K, P, d]
        x = _padded(x, self.layout.prompt_pad).float()
        x = x.view(self.layout.num_prompts, -1, self.kv, self.width).transpose(1, 2)
        return x.reshape(-1, x.shape[2], self.width)

    def prompt_key_tokens(self, x: Tensor) -> Tensor:  # the inverse
        x = x.view(self.layout.num_prompts, self.kv, -1, self.width).transpose(1, 2)
        return _unpadded(x.reshape(-1, self.kv, self.width), self.layout.prompt_unpad)

    def queries(self, x: Tensor) -> Tensor:  # [tokens, H, d] -> [G K, S M R, d]
        x = _spread(x, self.layout.response_pad, self.layout.response_unpad).float()
        x = x.view(self.groups, self.siblings, -1, self.kv, self.per_key, self.width)
        x = x.permute(0, 3, 1, 4, 2, 5)
        return x.reshape(self.groups * self.kv, -1, self.width)

    def tokens(self, x: Tensor) -> Tensor:  # the inverse
        x = x.view(self.groups, self.kv, self.siblings, self.per_key, -1, self.width)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.heads, self.width)
        return _unpadded(x, self.layout.response_unpad)

    def keys(self, x: Tensor) -> Tensor:  # [tokens, K, d] -> [G K S, R, d]
        x = _padded(x, self.layout.response_pad).float()
        x = x.view(self.groups, self.siblings, -1, self.kv, self.width).permute(0, 3, 1, 2, 4)
        return x.reshape(-1, x.shape[3], self.width)

    def key_tokens(self, x: Tensor) -> Tensor:  # the inverse
        x = x.view(self.groups, self.kv, self.siblings, -1, self.width).permute(0, 2, 3, 1, 4)
        return _unpadded(x.reshape(-1, self.kv, self.width), self.layout.response_unpad)

    def each(self, x: Tensor) -> Tensor:  # [G K, S M R, z] -> [G K S, M R, z], the same memory
        return x.view(self.groups * self.kv * self.siblings, -1, x.shape[-1])

    def hide_padding(self, scores: Tensor, mask: Tensor) -> None:
        """`scores` [G K, S M R, P]; `mask` [B, 1, R, P + R] says which prompt tokens are real."""
        first = mask[:: self.siblings, 0, 0, : scores.shape[-1]]  # [G, P]
        scores.view(self.groups, self.kv, -1, scores.shape[-1]).add_(first[:, None, None].float())

    def for_siblings(self, x: Tensor) -> Tensor:  # [G K, P, d] -> [groups K, P, d]
        if self.layout.siblings is not None:
            return x
        x = x.view(self.layout.num_prompts, self.kv, -1, self.width)
        return x.index_select(0, self.layout.prompt_of).flatten(0, 1)

    def over_siblings(self, x: Tensor) -> Tensor:  # [groups K, P, d] -> [G K, P, d]
        if self.layout.siblings is not None:
            return x
        x = x.view(self.groups, self.kv, -1, self.width)
        total = x.new_zeros(self.layout.num_prompts, *x.shape[1:])
        return total.index_add_(0, self.layout.prompt_of, x).flatten(0, 1)


def _padded(x: Tensor, pad: Tensor | None) -> Tensor:
    return x if pad is None else x.index_select(0, pad)


def _spread(x: Tensor, pad: Tensor | None, unpad: Tensor | None) -> Tensor:
    """As `_padded`, but with zeros in padded places: for gradients, which must not be repeated."""
    if pad is None or unpad is None:
        return x
    return x.new_zeros(len(pad), *x.shape[1:]).index_copy_(0, unpad, x)


def _unpadded(x: Tensor, unpad: Tensor | None) -> Tensor:
    return x if unpad is None else x.index_select(0, unpad)
