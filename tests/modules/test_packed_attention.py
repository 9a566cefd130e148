"""What is built on the kernel, by a kernel in plain torch; which kernel is chosen where."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_flows.modules.packed_attention import (
    FlashKernel,
    SharedSpans,
    flash_kernel,
    packed_attention,
    shared_prefix_attention,
    spans_of,
)
from tests.modules.plain_attention import PlainKernel

SCALE = 0.3


def heads(tokens: int) -> list[Tensor]:
    """Four query heads, two key-value heads, six wide."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, h, 6, generator=g, dtype=torch.float64).requires_grad_()
        for h in (4, 2, 2)
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """By torch, with a mask of all tokens."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1)


def agree(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_texts_do_not_see_each_other(window: int | None) -> None:
    lengths = [5, 1, 8]
    inputs = heads(sum(lengths))
    seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    if window is not None:
        places = torch.arange(len(seen))
        seen &= places[:, None] - places < window
    spans = spans_of(lengths, device="cpu", window=window)
    found = packed_attention(*inputs, spans, scale=SCALE, kernel=PlainKernel())
    agree(found, dense(*inputs, seen), inputs)


@pytest.mark.parametrize(
    "responses",
    [[[3, 5], [2], [4, 1, 6]], [[0, 3], [0], [2]], [[0], [0], [0]]],
    ids=["uneven", "some without a token", "none"],
)
def test_a_response_sees_its_prompt_and_itself_in_one_softmax(responses: list[list[int]]) -> None:
    prompts = [4, 1, 7]
    at, flat = sum(prompts), [n for group in responses for n in group]
    inputs = heads(at + sum(flat))
    seen = torch.zeros(len(inputs[0]), len(inputs[0]), dtype=torch.bool)
    starts = list(accumulate(prompts, initial=0))
    for start, stop in pairwise(starts):
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril()
    place = at
    for group, (start, stop) in zip(responses, pairwise(starts), strict=True):
        for n in group:
            seen[place : place + n, start:stop] = True
            seen[place : place + n, place : place + n] = torch.ones(n, n).tril()
            place += n
    spans = SharedSpans(
        prompts=spans_of(prompts, device="cpu"),
        own=spans_of(flat, device="cpu"),
        seen=spans_of([sum(group) for group in responses], prompts, device="cpu"),
    )
    found = shared_prefix_attention(
        *inputs, spans, num_prompt_tokens=at, scale=SCALE, kernel=PlainKernel()
    )
    agree(found, dense(*inputs, seen), inputs)


@pytest.mark.parametrize(
    ("device", "dtype", "width"),
    [("cpu", torch.bfloat16, 64), ("cuda", torch.float32, 64)]
    + [("cuda", torch.bfloat16, width) for width in (12, 257, 264)],
)
def test_where_there_is_no_flash_attention_none_is_chosen(
    device: str, dtype: torch.dtype, width: int
) -> None:
    assert flash_kernel(device, dtype, width) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_flash_attention_is_chosen_from_ampere_on(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = flash_kernel("cuda", torch.bfloat16, 128)
    assert isinstance(chosen, FlashKernel) == (capability >= (8, 0))


@pytest.mark.parametrize("window", [None, 3])
def test_torch_has_the_kernel_with_the_arguments_it_is_called_with(window: int | None) -> None:
    """On the device that computes nothing: the schemas, and the shapes of what comes back."""
    inputs = [x.detach().to("meta", torch.bfloat16) for x in heads(16)]
    spans = spans_of([5, 11], device="meta", window=window)
    out, lse = FlashKernel().forward(*inputs, spans, SCALE)
    assert (out.shape, lse.shape) == ((16, 4, 6), (4, 16))
    found = FlashKernel().backward(out, *inputs, out, lse, spans, SCALE)
    assert [x.shape for x in found] == [x.shape for x in inputs]
