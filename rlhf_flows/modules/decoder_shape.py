"""What a decoder is made of, in numbers: all that it takes to build one of the usual kind.

Pre-norm layers of attention with rotary positions and a gated MLP, RMS norms, no dropout. Read from
a model's configuration by its family (`rlhf_flows.models.families`); what builds from it is
`megatron/model.py`. Knows no library of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Activation", "DecoderShape"]

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """A decoder's sizes and kinds; weights are elsewhere."""

    num_layers: int
    width: int
    num_heads: int
    num_groups: int
    """Key-value heads."""
    head_width: int
    mlp_width: int
    """Columns of the gate, and as many of the up projection."""
    vocabulary_size: int
    """Tokens there are; what is padded to fit a topology is not counted."""
    max_positions: int
    norm_eps: float
    activation: Activation
    rotary_frequencies: tuple[float, ...]
    """Radians a position of each pair of a head's columns, [head_width / 2]."""
    tied: bool
    """Whether the head's matrix is the embedding's."""
    scalar_head: bool = False
    """Whether it ends in one number a token, `score`, in place of a vocabulary; never tied."""
    qkv_bias: bool = False
    all_biases: bool = False
    """Of every linear layer, those of queries, keys and values included."""
    qk_norm: bool = False
    """Whether queries and keys have norms of their own, one for all heads."""
    zero_centered_norms: bool = False
    """Whether norms multiply by one more than their weight."""
    embedding_scale: float = 1.0
    padding_token: int | None = None
    """A token whose embedding learns nothing from where it is read, as `torch.nn.Embedding` has it;
    where embedding and head are one matrix, it learns from the head."""
    windows: tuple[int | None, ...]
    """Of each layer: tokens that one sees, itself counted; None sees all before it."""
