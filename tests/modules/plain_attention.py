"""The kernel of packed attention as its formulas say, span by span: what CUDA's is to compute."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rlhf_flows.modules.packed_attention import Spans


class PlainKernel:
    """On any device and in any dtype, with every probability made."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
        for rows, columns in places(spans):
            scores = self.scores(query[rows], key[columns], spans, scale)
            lse[:, rows] = scores.logsumexp(-1)
            p = (scores - lse[:, rows, None]).exp()
            out[rows] = torch.einsum("hqk,khw->qhw", p, each_head(value[columns], query))
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
        found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows, columns in places(spans):
            q, g = query[rows], grad[rows]
            k, v = each_head(key[columns], q), each_head(value[columns], q)
            p = (self.scores(q, key[columns], spans, scale) - lse[:, rows, None]).exp()
            d = torch.einsum("qhw,khw->hqk", g, v) - (g * out[rows]).sum(-1).T[:, :, None]
            d = p * d * scale
            found[0][rows] = torch.einsum("hqk,khw->qhw", d, k)
            found[1][columns] = over_groups(torch.einsum("hqk,qhw->khw", d, q), key)
            found[2][columns] = over_groups(torch.einsum("hqk,qhw->khw", p, g), value)
        return found

    def scores(self, q: Tensor, key: Tensor, spans: Spans, scale: float) -> Tensor:  # [H, q, k]
        scores = torch.einsum("qhw,khw->hqk", q, each_head(key, q)) * scale
        if spans.is_causal:
            behind = torch.arange(len(q))[:, None] - torch.arange(len(key))
            hidden = behind < 0
            if spans.window is not None:
                hidden |= behind >= spans.window
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores


def places(spans: Spans) -> list[tuple[slice, slice]]:
    return [
        (slice(*rows), slice(*columns))
        for rows, columns in zip(
            pairwise(spans.query_ends.tolist()), pairwise(spans.key_ends.tolist()), strict=True
        )
    ]


def each_head(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def over_groups(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(1, (like.shape[1], x.shape[1] // like.shape[1])).sum(2)
