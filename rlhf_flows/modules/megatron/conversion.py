"""Between Megatron's parameters of a decoder and those of its Hugging Face checkpoint.

The decision here: a conversion of one rank's share is the conversion of a smaller model, with that
rank's heads and columns. So nothing is cut in Megatron's packed order: checkpoint tensors are cut
along one axis each, and packed after it. Pure tensors; Megatron itself is not imported.

Megatron packs queries, keys and values of one key-value head beside each other: for each such head
its H / G query heads, its key, its value. Gate and up projection are one matrix, the gate first.

Letters: H query heads, G key-value heads, w width of a head, D width, F columns of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_flows.modules.conversion import Conversion
from rlhf_flows.modules.decoder_shape import DecoderShape

__all__ = ["MegatronConversion", "Part", "ShardedConversion"]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
SCORE = "score.weight"
"""Of a scalar head, [1, D]; its checkpoint's name as well."""


class Part(NamedTuple):
    name: str
    """In the checkpoint."""
    axis: int | None
    """Which of its axes the tensor parallel ranks share; None: each has all of it."""


class ShardedConversion(Conversion, Protocol):
    """A conversion of what one tensor parallel rank has, which says what that is."""

    def parts(self, name: str) -> Sequence[Part]:
        """What a parameter is made of, in the order of `split` and `merge`."""


_LAYER: dict[str, tuple[tuple[str, ...], int]] = {
    "input_layernorm": (("input_layernorm",), -1),
    "self_attention.linear_qkv": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        0,
    ),
    "self_attention.q_layernorm": (("self_attn.q_norm",), -1),
    "self_attention.k_layernorm": (("self_attn.k_norm",), -1),
    "self_attention.linear_proj": (("self_attn.o_proj",), 1),
    "pre_mlp_layernorm": (("post_attention_layernorm",), -1),
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), 0),
    "mlp.linear_fc2": (("mlp.down_proj",), 1),
}
"""Modules of a layer, theirs in the checkpoint, and the axis that is shared; -1 for none."""


class MegatronConversion:
    """Of decoders whose checkpoints have Llama's names. Layers are numbered over all stages."""

    def __init__(self, shape: DecoderShape, *, tensor_parallel: int = 1) -> None:
        self.shape = shape
        self.num_groups = shape.num_groups // tensor_parallel
        self.heads_per_group = shape.num_heads // shape.num_groups

    def parts(self, name: str) -> Sequence[Part]:
        if name == EMBEDDING or (name == HEAD and self.shape.tied):
            return [Part("model.embed_tokens.weight", 0)]
        if name == HEAD:
            return [Part("lm_head.weight", 0)]
        if name == SCORE:
            return [Part(SCORE, None)]
        if name == "decoder.final_layernorm.weight":
            return [Part("model.norm.weight", None)]
        _, _, layer, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        theirs, axis = _LAYER[module]
        # What is summed over ranks has its bias added once, after the sum.
        shared = axis == 0 or (axis == 1 and kind == "weight")
        return [Part(f"model.layers.{layer}.{m}.{kind}", axis if shared else None) for m in theirs]

    def split(self, name: str, tensor: Tensor) -> Sequence[tuple[str, Tensor]]:
        names = [part.name for part in self.parts(name)]
        if len(names) == 1:
            pieces = [tensor]
        elif len(names) == 2:
            pieces = list(tensor.chunk(2))
        else:
            w, rest = self.shape.head_width, tensor.shape[1:]
            packed = tensor.view(self.num_groups, -1, *rest)  # [G, (H / G + 2) w, ...]
            pieces = [
                piece.reshape(-1, *rest)
                for piece in packed.split([self.heads_per_group * w, w, w], dim=1)
            ]
        return list(zip(names, pieces, strict=True))

    def merge(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            return torch.cat(list(parts))
        rest = parts[0].shape[1:]
        grouped = [part.reshape(self.num_groups, -1, *rest) for part in parts]
        return torch.cat(grouped, dim=1).view(-1, *rest)
