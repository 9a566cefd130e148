"""The attention of packed texts, kernel beside kernel: milliseconds forward and backward, and how
far each is from float32.

What the trainers take on CUDA is named `flash` here, and `each text` is what they fall back to. The
others are what torch has besides; where one of them wins, the trainers' choice is to follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arithmetic import Text
from benchmarks.learners import mixed_texts
from rlhf_flows.modules.packed_attention import (
    SharedSpans,
    flash_kernel,
    packed_attention,
    shared_prefix_attention,
    spans_of,
)

__all__ = ["measure_attention"]

_SDPA: Any = F.scaled_dot_product_attention
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[T, H, w], [T, G, w] twice -> [T, H, w]"""


def measure_attention(device: str, *, rehearsal: bool) -> Iterator[dict[str, Any]]:
    """One row a kernel and shape; a kernel that fails says why in its row."""
    dtype = torch.float32 if rehearsal else torch.bfloat16
    cases = [(4, 2, 16)] if rehearsal else [(12, 2, 128), (28, 4, 128), (32, 8, 64)]
    tokens, longest = (96, 48) if rehearsal else (16384, 4096)
    lengths = [p + r for p, r in mixed_texts(tokens, longest=longest)]
    for i, (heads, groups, width) in enumerate(cases):
        what = f"{heads} heads, {groups} groups, {width} wide, {len(lengths)} texts"
        inputs = _inputs(sum(lengths), heads, groups, width, device=device, dtype=dtype)
        exact = _reference(inputs, lengths)
        flops = sum(6.0 * heads * width * n * (n + 1) for n in lengths)
        ways = _ways(lengths, width, device, dtype)
        if device != "cpu" and i == 0:  # once: it is compiled for half a minute
            ways["flex"] = _flex(lengths, device, width**-0.5)
        for name, attention in ways.items():
            yield _row(what, name, attention, inputs, exact, flops, device)
    yield from _shared(device, rehearsal=rehearsal, dtype=dtype)


def _ways(lengths: list[int], width: int, device: str, dtype: torch.dtype) -> dict[str, Attention]:
    scale = width**-0.5
    ways: dict[str, Attention] = {
        "each text": lambda q, k, v: _each_text(q, k, v, lengths, scale),
        "padded rows": lambda q, k, v: _padded(q, k, v, lengths, scale),
    }
    kernel = flash_kernel(device, dtype, width)
    spans = spans_of(lengths, device=device)
    if kernel is not None:
        ways["flash"] = lambda q, k, v: packed_attention(q, k, v, spans, scale=scale, kernel=kernel)
    if device != "cpu":
        ways["each text, cuDNN"] = _by_cudnn(lengths, scale)
        ways["nested"] = lambda q, k, v: _nested(q, k, v, spans.query_ends, max(lengths), scale)
    return ways


def _each_text(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outs = [_SDPA(*(x[None] for x in part), is_causal=True, scale=scale)[0] for part in parts]
    return torch.cat(outs, dim=1).transpose(0, 1)


def _by_cudnn(lengths: list[int], scale: float) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _each_text(q, k, v, lengths, scale)

    return attention


def _padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = [
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    ]
    out = _SDPA(*rows, is_causal=True, scale=scale).transpose(1, 2)
    return torch.cat([out[i, :n] for i, n in enumerate(lengths)])


def _nested(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    rows = [
        torch.nested.nested_tensor_from_jagged(x, ends.long(), max_seqlen=longest).transpose(1, 2)
        for x in (q, k, v)
    ]
    out: Any = _SDPA(*rows, is_causal=True, scale=scale)
    found: Tensor = out.transpose(1, 2).values()
    return found


def _flex(lengths: list[int], device: str, scale: float) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    text_of = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths)
    ).to(device)  # fmt: skip
    compiled: Any = torch.compile(flex_attention)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (text_of[query] == text_of[key])

    total = sum(lengths)
    mask = create_block_mask(sees, None, None, total, total, device=device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out: Tensor = compiled(*rows, block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attention


def _shared(device: str, *, rehearsal: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Groups of siblings: what is shared with each prompt once, beside each text with its own."""
    heads, groups, width = (4, 2, 16) if rehearsal else (12, 2, 128)
    prompts = [24, 7] if rehearsal else [1024, 512, 2048, 256]
    response, siblings = (9, 3) if rehearsal else (512, 8)
    texts: list[Text] = [(p, response) for p in prompts for _ in range(siblings)]
    spans = SharedSpans(
        prompts=spans_of(prompts, device=device),
        own=spans_of([r for _, r in texts], device=device),
        seen=spans_of([response * siblings] * len(prompts), prompts, device=device),
    )
    at, scale = sum(prompts), width**-0.5
    inputs = _inputs(
        at + len(texts) * response, heads, groups, width, device=device, dtype=dtype
    )  # fmt: skip
    exact = _shared_reference(inputs, prompts, response, siblings)
    pairs = sum(p * (p + 1) / 2 for p in prompts)
    pairs += sum(r * p + r * (r + 1) / 2 for p, r in texts)
    what = f"{len(prompts)} prompts of {siblings} responses, {heads} heads, {width} wide"
    kernel = flash_kernel(device, dtype, width)
    if kernel is not None:
        yield _row(
            what,
            "flash, prompts shared",
            lambda q, k, v: shared_prefix_attention(
                q, k, v, spans, num_prompt_tokens=at, scale=scale, kernel=kernel
            ),
            inputs,
            exact,
            12.0 * heads * width * pairs,
            device,
        )
    yield _row(
        what,
        "masked rows, prompts copied",
        lambda q, k, v: _copied(q, k, v, prompts, response, siblings),
        inputs,
        exact,
        12.0 * heads * width * pairs,
        device,
    )


def _copied(
    q: Tensor, k: Tensor, v: Tensor, prompts: list[int], response: int, siblings: int
) -> Tensor:
    """Each prompt on itself, its responses on it and themselves, group by group."""
    at, outs, rests = sum(prompts), [], []
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for i, (start, stop) in enumerate(pairwise(accumulate(prompts, initial=0))):
        rows = [x[None, start:stop].transpose(1, 2) for x in (q, k, v)]
        outs.append(_SDPA(*rows, is_causal=True)[0].transpose(0, 1))
        first = at + i * response * siblings
        own = [
            x[first : first + response * siblings]
            .view(siblings, response, *x.shape[1:])
            .transpose(1, 2)
            for x in (q, k, v)
        ]
        keys = [
            torch.cat([x.expand(siblings, -1, -1, -1), y], dim=2)
            for x, y in zip(rows[1:], own[1:], strict=True)
        ]
        seen = torch.ones(response, stop - start + response, dtype=torch.bool, device=q.device)
        out = _SDPA(own[0], *keys, attn_mask=seen.tril(diagonal=stop - start))
        rests.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat([*outs, *rests])


# ---- how they are measured ----------------------------------------------------------------------


def _inputs(
    tokens: int, heads: int, groups: int, width: int, *, device: str, dtype: torch.dtype
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, n, width, generator=g).to(device, dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


def _gradients(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    out = attention(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def _reference(inputs: list[Tensor], lengths: list[int]) -> list[Tensor]:
    wide = [x.detach().float().requires_grad_() for x in inputs]
    scale = inputs[0].shape[-1] ** -0.5
    return _gradients(lambda q, k, v: _each_text(q, k, v, lengths, scale), wide)


def _shared_reference(
    inputs: list[Tensor], prompts: list[int], response: int, siblings: int
) -> list[Tensor]:
    wide = [x.detach().float().requires_grad_() for x in inputs]
    return _gradients(lambda q, k, v: _copied(q, k, v, prompts, response, siblings), wide)


def _row(
    what: str,
    name: str,
    attention: Attention,
    inputs: list[Tensor],
    exact: list[Tensor],
    flops: float,
    device: str,
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "kernel": name}
    try:
        started = time.perf_counter()
        found = _gradients(attention, inputs)
        row["first_call_s"] = time.perf_counter() - started
        row["error"] = max(
            float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
        )
        upstream = torch.randn_like(found[0])
        row["forward_ms"] = 1e3 * _seconds(lambda: attention(*inputs), device)
        row["both_ms"] = 1e3 * _seconds(
            lambda: torch.autograd.grad(attention(*inputs), inputs, upstream), device
        )
        row["tflops"] = flops / row["both_ms"] / 1e9
    except Exception as failure:  # of whatever kind: the other kernels are measured all the same
        row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    return row


def _seconds(work: Callable[[], object], device: str, most_s: float = 0.5) -> float:
    """The median of as many as fit, each waited for."""
    found: list[float] = []
    work()
    end = time.perf_counter() + most_s
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 20):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 2]
