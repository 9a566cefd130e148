"""The floor of training: the arithmetic of a step, and how fast this machine multiplies matrices.

Counted are multiplications and additions of the layers' matrices for every token that is computed
(6 for each of their parameters: forward, and two as much backward), of the head for the tokens that
are scored alone, and of attention for the pairs of tokens that see each other. What a trainer
computes twice to save memory, pads, or does beside products is not counted, so no program reaches
the floor.

The rate is that of the model's own products, forward and backward, at the size of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_flows.modules.decoder_shape import DecoderShape

__all__ = ["Text", "dense_peak", "forward_flops", "matmul_rate", "parameters_of", "training_flops"]

Text = tuple[int, int]
"""Tokens of a prompt and of its response."""

_PEAKS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
}
"""FLOP/s of dense bfloat16 products, by the makers' data sheets; the first name found counts."""


def dense_peak(device_name: str) -> float | None:
    """FLOP/s of bfloat16 by the data sheet; None of a device that is not known here."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def _matrices(shape: DecoderShape) -> list[tuple[int, int]]:
    """Outputs and inputs of the products of a layer."""
    attended = shape.num_heads * shape.head_width
    packed = attended + 2 * shape.num_groups * shape.head_width
    return [
        (packed, shape.width),
        (shape.width, attended),
        (2 * shape.mlp_width, shape.width),
        (shape.width, shape.mlp_width),
    ]


def parameters_of(shape: DecoderShape) -> int:
    """Of all matrices; a tied head counts once."""
    layers = shape.num_layers * sum(a * b for a, b in _matrices(shape))
    return layers + shape.vocabulary_size * shape.width * (1 if shape.tied else 2)


def forward_flops(shape: DecoderShape, texts: Sequence[Text], *, siblings: int = 1) -> float:
    """Of one pass over texts of which each prompt is computed once for so many neighbours."""
    body = 2.0 * shape.num_layers * sum(a * b for a, b in _matrices(shape))
    head = 2.0 * shape.vocabulary_size * shape.width
    pair = 4.0 * shape.num_layers * shape.num_heads * shape.head_width
    total = 0.0
    for i, (prompt, response) in enumerate(texts):
        # A response's last token predicts nothing, and is not computed with.
        own = response - 1
        pairs = own * prompt + own * (own + 1) / 2
        total += own * body + response * head + pairs * pair
        if i % siblings == 0:
            total += prompt * body + prompt * (prompt + 1) / 2 * pair
    return total


def training_flops(shape: DecoderShape, texts: Sequence[Text], *, siblings: int = 1) -> float:
    return 3.0 * forward_flops(shape, texts, siblings=siblings)


def matmul_rate(
    shape: DecoderShape, *, tokens: int, dtype: torch.dtype, device: str, seconds: float = 2.0
) -> float:
    """FLOP/s of a layer's products and the head's, forward and backward; on a CPU, by its seconds.

    The best of what was seen in `seconds`, each matrix of the model weighed by its work.
    """
    products: list[tuple[float, Callable[[], Tensor]]] = []
    share = dict.fromkeys(_matrices(shape), shape.num_layers)
    share[(shape.vocabulary_size, shape.width)] = 1
    for (out, into), count in share.items():
        # As many rows of logits at a time as the head of the trainers makes.
        rows = tokens if out != shape.vocabulary_size else max(1, min(tokens, 2**27 // out))
        x, g = (torch.randn(rows, n, device=device).to(dtype) for n in (into, out))
        w = torch.randn(out, into, device=device).to(dtype)
        weight = count * tokens / rows
        products.append((weight, lambda x=x, w=w: x @ w.T))  # type: ignore[misc]
        products.append((weight, lambda g=g, w=w: g @ w))  # type: ignore[misc]
        products.append((weight, lambda g=g, x=x: g.T @ x))  # type: ignore[misc]
    spent = sum(
        weight * _fastest(product, device, seconds / len(products)) for weight, product in products
    )
    flops = 6.0 * tokens * sum(count * out * into for (out, into), count in share.items())
    return flops / spent


def _fastest(product: Callable[[], Tensor], device: str, seconds: float) -> float:
    best = float("inf")
    product()
    # Wall time says little where others use the same cores.
    clock = time.process_time if device == "cpu" else time.perf_counter
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        repeats = 1 if device == "cpu" else 10
        _wait(device)
        started = clock()
        for _ in range(repeats):
            product()
        _wait(device)
        best = min(best, (clock() - started) / repeats)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
