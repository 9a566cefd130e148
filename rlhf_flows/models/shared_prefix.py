"""The layout in which nothing is computed twice: each prompt once, its responses beside it.

The siblings of a group share their prompt, so its keys and values are the same for all of them. A
micro-batch is one row of real tokens, without padding: first the prompts, one per group, then the
responses. All per-token work (projections, MLPs, norms) runs on that row; only attention looks at
sequences, through the interface that `transformers` models call. Exact: logprobs and gradients are
those of one padded row per sample, up to rounding.

Two more savings: a response's last token predicts nothing, so it is never an input; and what
follows the prompt's last token is predicted once for all siblings.

Attention is chosen by device. On CUDA it is flash attention of packed texts, without padding
(modules/packed_attention.py), where that takes the model's heads. In general it is two SDPA calls,
prompts on themselves and responses on prompt and self; a dense mask over the whole row costs more
than it saves. On CPU, short sequences go through plain products (cpu_attention.py).

Letters: G prompts (groups), P longest prompt, B responses (samples), R longest response input,
N tokens in the row, T scored response tokens of all samples, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_flows.models.cpu_attention import fits, product_attention
from rlhf_flows.modules import packed_attention
from rlhf_flows.modules.packed_attention import SharedSpans, flash_kernel, spans_of

__all__ = ["ATTENTION", "SharedPrefixLayout", "build_layout"]

ATTENTION = "rlhf_flows_shared_prefix"
"""The attention implementation to load a model with; plain SDPA where no layout is passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixLayout:
    """Which token of the row belongs where; made once per micro-batch, used by every layer."""

    input_ids: Tensor
    """[1, N] prompts, then responses without their last tokens."""
    position_ids: Tensor
    """[1, N]"""
    num_prompt_tokens: int
    prompt_pad: Tensor | None
    """[G * P] row token of each padded place; None where all prompts are equally long."""
    prompt_unpad: Tensor | None
    """[prompt tokens] padded place of each token."""
    num_prompts: int
    response_pad: Tensor | None
    """[B * R], as for prompts, counted from the first response token."""
    response_unpad: Tensor | None
    num_responses: int
    siblings: int | None
    """Responses per prompt where every prompt has as many; else None."""
    prompt_of: Tensor
    """[B] prompt of each response, ascending."""
    mask: Tensor | None
    """[B, 1, R, P + R] added to the scores of responses: 0 or minus infinity; None beside spans."""
    spans: SharedSpans | None
    """Who sees whom, for a kernel that needs no padding; None where there is no such kernel."""
    last_prompt_tokens: Tensor
    """[G] row token that ends each prompt."""
    score_rows: Tensor
    """[T] row of `scored_hidden` that predicts each scored token, ascending."""
    score_targets: Tensor
    """[T] token ids, in the order of `score_rows`."""
    sample_order: Tensor
    """[T] place in `score_rows` of each token, in sample order."""

    def scored_hidden(self, hidden: Tensor) -> Tensor:  # [N, D] -> [G + response tokens, D]
        """The hidden states that predict something: ends of prompts, then responses."""
        ends = hidden.index_select(0, self.last_prompt_tokens)
        return torch.cat([ends, hidden[self.num_prompt_tokens :]])


def build_layout(
    prompts: Sequence[Tensor],  # G of [p]
    responses: Sequence[Tensor],  # B of [r], siblings together, in the order of the prompts
    siblings: Sequence[int],  # G: how many responses each prompt has
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> SharedPrefixLayout:
    """With `packed`, for a kernel of packed texts: spans in place of the mask."""
    assert len(prompts) == len(siblings)
    assert sum(siblings) == len(responses)
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    response_lengths = torch.tensor([len(r) for r in responses])
    input_lengths = (response_lengths - 1).clamp(min=0)
    num_prompt_tokens = int(prompt_lengths.sum())
    prompt_of = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(siblings))

    row = torch.cat([*prompts, *(r[:-1] for r in responses)])
    positions = torch.cat([_places(prompt_lengths), _places(input_lengths)])
    start = torch.repeat_interleave(prompt_lengths[prompt_of], input_lengths)
    positions[num_prompt_tokens:] += start

    prompt_pad, prompt_unpad = _padding(prompt_lengths)
    response_pad, response_unpad = _padding(input_lengths)
    # Each response's first token is scored from the end of its prompt, the others from the
    # response itself: all first tokens, then the others, is the order in which rows ascend.
    targets = torch.cat(list(responses))
    place = _places(response_lengths)
    sample = torch.repeat_interleave(torch.arange(len(responses)), response_lengths)
    first_input = len(prompts) + input_lengths.cumsum(0) - input_lengths  # [B]
    rows = torch.where(place == 0, prompt_of[sample], first_input[sample] + place - 1)
    order = torch.cat([(place == 0).nonzero()[:, 0], (place > 0).nonzero()[:, 0]])
    sample_order = torch.empty_like(order)
    sample_order[order] = torch.arange(len(order))

    return SharedPrefixLayout(
        input_ids=row[None].to(device),
        position_ids=positions[None].to(device),
        num_prompt_tokens=num_prompt_tokens,
        prompt_pad=_to(prompt_pad, device),
        prompt_unpad=_to(prompt_unpad, device),
        num_prompts=len(prompts),
        response_pad=_to(response_pad, device),
        response_unpad=_to(response_unpad, device),
        num_responses=len(responses),
        siblings=siblings[0] if len(set(siblings)) == 1 else None,
        prompt_of=prompt_of.to(device),
        mask=None if packed else _mask(prompt_lengths[prompt_of], input_lengths, dtype).to(device),
        spans=_spans(prompt_lengths, prompt_of, input_lengths, device) if packed else None,
        last_prompt_tokens=(prompt_lengths.cumsum(0) - 1).to(device),
        score_rows=rows[order].to(device),
        score_targets=targets[order].to(device),
        sample_order=sample_order.to(device),
    )


def _mask(
    prompts: Tensor,  # [B] length of each response's prompt
    inputs: Tensor,  # [B] of the response
    dtype: torch.dtype,
) -> Tensor:  # [B, 1, R, P + R]
    longest, longest_input = int(prompts.max()), int(inputs.max())
    sees_prompt = torch.arange(longest) < prompts[:, None]  # [B, P]
    sees_self = torch.ones(longest_input, longest_input, dtype=torch.bool).tril()
    seen = torch.cat(
        [
            sees_prompt[:, None].expand(-1, longest_input, -1),
            sees_self.expand(len(inputs), -1, -1),
        ],
        dim=2,
    )
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return mask[:, None]


def _spans(
    prompts: Tensor,  # [G] lengths
    prompt_of: Tensor,  # [B]
    inputs: Tensor,  # [B] lengths
    device: torch.device | str,
) -> SharedSpans:
    of_group = torch.zeros_like(prompts).index_add_(0, prompt_of, inputs)
    return SharedSpans(
        prompts=spans_of(prompts.tolist(), device=device),
        own=spans_of(inputs.tolist(), device=device),
        seen=spans_of(of_group.tolist(), prompts.tolist(), device=device),
    )


def _places(lengths: Tensor) -> Tensor:
    """0..n-1 for each length n, one after another."""
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(int(lengths.sum())) - first


def _padding(lengths: Tensor) -> tuple[Tensor | None, Tensor | None]:
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return None, None
    first = lengths.cumsum(0) - lengths
    # A padded place repeats the first token of the row: any finite value does, since no real
    # token attends to it.
    places = torch.arange(longest)
    pad = torch.where(places < lengths[:, None], first[:, None] + places, 0).flatten()
    unpad = torch.repeat_interleave(torch.arange(len(lengths)) * longest, lengths) + _places(
        lengths
    )
    return pad, unpad


def _to(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class _Rearrange(torch.autograd.Function):
    """x[index], where the entries of `index` that matter are each used once: `inverse` undoes it.

    Plain indexing would add gradients up one by one, which is slow, and not needed here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _padded(x: Tensor, count: int, pad: Tensor | None, unpad: Tensor | None) -> Tensor:
    """[tokens, H, d] -> [count, H, longest, d]"""
    if pad is not None and unpad is not None:
        x = _UNTYPED_REARRANGE.apply(x, pad, unpad)
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


def _flat(x: Tensor, pad: Tensor | None, unpad: Tensor | None) -> Tensor:
    """[count, H, longest, d] -> [tokens, H, d]"""
    x = x.transpose(1, 2).flatten(0, 1)
    if pad is not None and unpad is not None:
        # Padded outputs are dropped, so their gradient is zero; the function's inverse would give
        # them the gradient of a real token.
        flat: Tensor = _UNTYPED_UNPAD.apply(x, unpad)
        return flat
    return x


class _Unpad(torch.autograd.Function):
    """x[index] with `index` free of repeats; rows that were not chosen get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, index, grad), None


# torch leaves `apply` without types.
_UNTYPED_REARRANGE: Any = _Rearrange
_UNTYPED_UNPAD: Any = _Unpad


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, N, d]
    key: Tensor,  # [1, H', N, d]
    value: Tensor,  # [1, H', N, d]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: SharedPrefixLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # [1, N, H, d]
    """Called by every layer of the model; `layout` arrives as a keyword of the model's call."""
    if layout is None:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )[0]
        return output, None
    at, pads = layout.num_prompt_tokens, (layout.prompt_pad, layout.prompt_unpad)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, H, d]
    if layout.spans is not None:
        return _by_kernel(rows, layout, scaling)[None], None
    assert layout.mask is not None
    if query.device.type == "cpu" and scaling is not None and fits(layout, query.shape[1]):
        return product_attention(*rows, layout=layout, scale=scaling)[None], None
    gqa = query.shape[1] != key.shape[1]
    # One split costs less in the backward pass than two slices.
    split = [x.split([at, x.shape[0] - at]) for x in rows]
    q, k, v = (_padded(x, layout.num_prompts, *pads) for x, _ in split)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    parts = [_flat(out, *pads)]
    if rows[0].shape[0] > at:
        pads = (layout.response_pad, layout.response_unpad)
        q, own_k, own_v = (_padded(x, layout.num_responses, *pads) for _, x in split)
        k = torch.cat([_for_siblings(k, layout), own_k], dim=2)
        v = torch.cat([_for_siblings(v, layout), own_v], dim=2)
        if gqa and query.device.type != "cpu":
            # With a mask, CUDA's fast kernels want as many key heads as query heads.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            gqa = False
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=layout.mask, scale=scaling, enable_gqa=gqa
        )
        parts.append(_flat(out, *pads))
    return torch.cat(parts)[None], None


def _by_kernel(
    rows: Sequence[Tensor],  # query, key, value: each [N, H, d]
    layout: SharedPrefixLayout,
    scaling: float | None,
) -> Tensor:  # [N, H, d]
    assert layout.spans is not None
    query, key, value = rows
    width = query.shape[-1]
    kernel = flash_kernel(query.device, query.dtype, width)
    assert kernel is not None, "spans are made where there is a kernel"
    return packed_attention.shared_prefix_attention(
        query,
        key,
        value,
        layout.spans,
        num_prompt_tokens=layout.num_prompt_tokens,
        scale=width**-0.5 if scaling is None else scaling,
        kernel=kernel,
    )


def _for_siblings(x: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """[G, H', P, d] -> [B, H', P, d]"""
    if layout.siblings is None:
        return x.index_select(0, layout.prompt_of)
    shape = (layout.num_prompts, layout.siblings, *x.shape[1:])
    return x[:, None].expand(shape).reshape(-1, *x.shape[1:])


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
