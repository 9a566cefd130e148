"""`ValueModel`: what is to be expected of a completion, before each of its tokens.

It follows a `ValueTrainer` as a policy follows its trainer. Made from a causal model its head is
zero, so that the first advantages are those of no value function at all.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.scalar_module import ScalarModule

__all__ = ["ValueModel"]


class ValueModel(ScalarModule):
    """Adds `values` to batches with `prompt_ids` and `response_ids`."""

    def __init__(
        self,
        name: str = "value",
        *,
        path: str | Path,
        dtype: DType = "float32",
        micro_batch_tokens: int = 8192,
        layout: Layout = "auto",
    ) -> None:
        """`path` is a causal model's folder, or that of a model with a scalar head, such as a
        reward model's or what a `ValueTrainer` saved; the rest is as in `CausalLMModule`.
        """
        super().__init__(
            name, path=path, dtype=dtype, micro_batch_tokens=micro_batch_tokens, layout=layout
        )

    def setup(self) -> None:
        super().setup()
        self.model.requires_grad_(False)

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """The batch with `values`: ragged float32, one before each response token."""
        return {**data, "values": self.all_scores(data)}
