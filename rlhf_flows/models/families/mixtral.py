"""Mixtral: a mixture of experts, whose checkpoints hold three matrices for each expert.

The running model of `transformers` 5 keeps the experts of a layer in two tensors: gate and up
projections [E, 2 I, D], and down projections [E, D, I]. The losses of this package have no term
that balances experts; docs/families.md says what that means.

Letters: E experts, I inner width of one, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.models.families.family import Family

__all__ = ["MIXTRAL", "MixtralExperts"]

_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"


class MixtralExperts:
    """Conversion of a Mixtral that runs in `transformers`; parts are views of what is split."""

    def __init__(self, config: Any) -> None:
        self.num_experts = int(config.num_local_experts)

    def split(self, name: str, tensor: Tensor) -> Sequence[tuple[str, Tensor]]:
        layer, is_moe, rest = name.partition(".mlp.")
        if not is_moe:
            return [(name, tensor)]
        block = f"{layer}.block_sparse_moe."
        if rest not in (_GATE_UP, _DOWN):
            return [(block + rest, tensor)]
        assert len(tensor) == self.num_experts
        parts: list[tuple[str, Tensor]] = []
        for i, expert in enumerate(tensor):
            # w1 is the gate, w3 the up and w2 the down projection.
            matrices = (
                zip(("w1", "w3"), expert.chunk(2), strict=True)
                if rest == _GATE_UP
                else (("w2", expert),)
            )
            parts += [(f"{block}experts.{i}.{w}.weight", matrix) for w, matrix in matrices]
        return parts

    def merge(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if name.endswith(_GATE_UP):
            return torch.cat(list(parts)).view(self.num_experts, -1, parts[0].shape[1])
        if name.endswith(_DOWN):
            return torch.stack(list(parts))
        (whole,) = parts
        return whole


MIXTRAL = Family(
    name="mixtral",
    causal="MixtralForCausalLM",
    scalar="MixtralForSequenceClassification",
    conversions={"transformers": MixtralExperts},
)
