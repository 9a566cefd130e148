"""The parts of a decoder layer that Megatron leaves to Transformer Engine, or computes in many
passes over memory: norms, rotary positions and attention of packed texts, the gate of the MLP.
Plain torch, given to Megatron by ModuleSpec; what computes is what the torch trainers use
(layer_ops.py).

Two decisions. No text sees another and nothing of the size [T, T] is ever made: on CUDA one call of
flash attention for all texts (packed_attention.py), elsewhere each text by torch's own kernel. And
positions belong to the packed texts, so what depends on them (`PackedTexts`) is made once for a
micro-batch, not by every layer: Megatron's own rotary positions of packed texts ask the device for
their lengths twice a layer, and cut and join the row.

Letters: T packed tokens, H query heads of this rank, G key-value heads of it, w width of a head,
I columns of the MLP that this rank has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_flows.modules.decoder_shape import Activation
from rlhf_flows.modules.layer_ops import gated, rms_norm, rotate
from rlhf_flows.modules.packed_attention import Spans, flash_kernel, packed_attention, spans_of

__all__ = ["GatedMLP", "PackedAttention", "PackedTexts", "RMSNorm", "weights_device"]


def weights_device(config: Any) -> torch.device | str | int:
    """Where Megatron's own layers make their weights."""
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


@dataclass
class PackedTexts(PackedSeqParams):  # type: ignore[misc]  # has no types
    """The texts of a row, and what layers need of them. Made by `of`."""

    lengths: tuple[int, ...] = ()
    spans: dict[int | None, Spans] = field(default_factory=dict)
    """By window."""
    _angles: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], *, device: torch.device | str) -> PackedTexts:
        spans = spans_of(lengths, device=device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=spans.query_ends,
            cu_seqlens_kv=spans.key_ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths,
            spans={None: spans},
        )

    def spans_within(self, window: int | None) -> Spans:
        if window not in self.spans:
            device = self.cu_seqlens_q.device
            self.spans[window] = spans_of(self.lengths, device=device, window=window)
        return self.spans[window]

    def angles(
        self, frequencies: tuple[float, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:  # each [1, T, w / 2]
        """Cosines and sines of the rotations of each token, for all layers of a model."""
        if self._angles is None:
            places = torch.cat([torch.arange(n) for n in self.lengths]).to(like.device)
            turns = torch.tensor(frequencies, dtype=torch.float32).to(like.device)
            angles = places.float()[None, :, None] * turns
            self._angles = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        return self._angles


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467); or (1 + weight), where Megatron's configuration says
    that weights are centered at zero.

    Megatron's own wrapper of torch's norm takes neither that nor sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = weights_device(config)
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # With each rank's share of the tokens comes a share of the gradient: Megatron sums those of
        # parameters that carry this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, offset=self.offset)


class GatedMLP(MLP):  # type: ignore[misc]  # has no types
    """As Megatron's, its gate in one pass over what was projected."""

    def __init__(self, config: Any, **_: Any) -> None:
        assert config.gated_linear_unit
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.activation: Activation = "silu" if config.activation_func is F.silu else "gelu_tanh"

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        assert per_token_scale is None, "of experts, of which there are none"
        projected, bias = self.linear_fc1(hidden_states)  # [T, 1, 2 I]
        if bias is not None:
            projected = projected + bias
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(gated(projected, self.activation))
        return output


class PackedAttention(MegatronModule):  # type: ignore[misc]  # has no types
    """Rotary positions and causal attention of packed texts; without dropout."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        windows: tuple[int | None, ...] = (),
        frequencies: tuple[float, ...] = (),
        **_: Any,
    ) -> None:
        """`layer_number` counts from 1, over all stages; `windows` and `frequencies` as in
        `DecoderShape`: without frequencies nothing is rotated.
        """
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = windows[layer_number - 1] if windows else None
        self.frequencies = frequencies

    def forward(
        self,
        query: Tensor,  # [T, H, w]
        key: Tensor,  # [T, G, w]
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # [T, H w]
        assert attention_mask is None, "texts are packed, not masked"
        assert attention_bias is None
        texts: PackedTexts = packed_seq_params
        if self.frequencies:
            angles = texts.angles(self.frequencies, query)
            query, key = (rotate(x[None], *angles)[0] for x in (query, key))
        kernel = flash_kernel(query.device, query.dtype, query.shape[-1])
        if kernel is not None:
            spans = texts.spans_within(self.window)
            return packed_attention(
                query, key, value, spans, scale=self.scale, kernel=kernel
            ).flatten(1)
        parts = zip(*(x.split(texts.lengths) for x in (query, key, value)), strict=True)
        outputs = [self._causal(*(x.transpose(0, 1) for x in text)) for text in parts]
        return torch.cat([x.transpose(0, 1) for x in outputs]).flatten(1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [H or G, S, w] -> [H, S, w]
        if q.shape[0] != k.shape[0]:
            siblings = q.shape[0] // k.shape[0]
            k, v = k.repeat_interleave(siblings, dim=0), v.repeat_interleave(siblings, dim=0)
        length = q.shape[1]
        q, k, v = q[None], k[None], v[None]
        if self.window is None or length <= self.window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)[0]
        places = torch.arange(length, device=q.device)
        behind = places[:, None] - places
        seen = (behind >= 0) & (behind < self.window)  # [S, S]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)[0]
