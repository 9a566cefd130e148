"""The two parts of a decoder layer that Megatron leaves to Transformer Engine: the attention itself
and the norms, as plain torch, the same code on CPU and CUDA. Given to Megatron by ModuleSpec.

The decision here: packed texts are attended one by one, each by torch's own kernel, so that no text
sees another and nothing of the size [T, T] is ever made.

Letters: T packed tokens, S tokens of a text, B texts of equal length, H query heads of this rank,
G key-value heads of it, w width of a head.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PackedAttention", "RMSNorm"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467); or (1 + weight), where Megatron's configuration says
    that weights are centered at zero.

    Megatron's own wrapper of torch's norm takes neither that nor sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With each rank's share of the tokens comes a share of the gradient: Megatron sums those of
        # parameters that carry this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


class PackedAttention(MegatronModule):  # type: ignore[misc]  # has no types
    """Causal attention of packed texts, or of texts of one length; without dropout."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        windows: tuple[int | None, ...] = (),
        **_: Any,
    ) -> None:
        """`layer_number` counts from 1, over all stages; `windows` as in `DecoderShape`."""
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = windows[layer_number - 1] if windows else None

    def forward(
        self,
        query: Tensor,  # [T, H, w], or [S, B, H, w]
        key: Tensor,  # [T, G, w], or [S, B, G, w]
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # [T, H w], or [S, B, H w]
        assert attention_mask is None, "texts are packed, not masked"
        assert attention_bias is None
        if packed_seq_params is None:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            return self._causal(q, k, v).permute(2, 0, 1, 3).flatten(2)
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        texts = []
        for start, stop in pairwise(boundaries):
            q, k, v = (t[None, start:stop].transpose(1, 2) for t in (query, key, value))
            texts.append(self._causal(q, k, v)[0].transpose(0, 1))
        return torch.cat(texts).flatten(1)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:  # [B, H or G, S, w] -> [B, H, ...]
        if q.shape[1] != k.shape[1]:
            siblings = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(siblings, dim=1), v.repeat_interleave(siblings, dim=1)
        length = q.shape[2]
        if self.window is None or length <= self.window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        places = torch.arange(length, device=q.device)
        behind = places[:, None] - places
        seen = (behind >= 0) & (behind < self.window)  # [S, S]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
