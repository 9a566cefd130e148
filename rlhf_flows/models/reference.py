"""`Reference`: the model whose logprobs a KL penalty compares with. It is frozen, or follows the
average of the policy's weights (`set_parameter_sync` with an eta).

It computes each prompt once, without gradient, at the temperature of the sampler, so that its
logprobs and the policy's are of the same distribution where the weights are.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_module import CausalLMModule
from rlhf_flows.models.response_logprobs import Layout

__all__ = ["Reference"]


class Reference(CausalLMModule):
    """Adds `reference_logprobs` to batches with `prompt_ids` and `response_ids`."""

    takes_any_dtype = True

    def __init__(
        self,
        name: str = "reference",
        *,
        path: str | Path,
        temperature: float = 1.0,
        dtype: DType = "float32",
        micro_batch_tokens: int = 8192,
        layout: Layout = "auto",
    ) -> None:
        """`temperature` is the sampler's; the rest is as in `CausalLMModule`."""
        super().__init__(
            name,
            path=path,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            layout=layout,
        )
        self.temperature = temperature

    def setup(self) -> None:
        super().setup()
        self.model.requires_grad_(False)

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """The batch with `reference_logprobs`: ragged float32, one per response token."""
        logprobs = self.all_logprobs(data, temperature=self.temperature)
        return {**data, "reference_logprobs": logprobs}
