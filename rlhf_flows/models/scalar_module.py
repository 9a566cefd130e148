"""What the roles with a scalar head share: `ValueModel`, `ValueTrainer`, `RewardModel`,
`RewardTrainer`.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm_module import CausalLMModule, column, groups_of, ragged
from rlhf_flows.models.scalar_model import (
    HeadInit,
    check_scalar_folder,
    last_scores,
    load_scalar_model,
    one_longer,
    response_scores,
)
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = ["ScalarModule"]


class ScalarModule(CausalLMModule):
    """A `CausalLMModule` whose folder is a causal model, or one with a head of one label."""

    head_init: ClassVar[HeadInit] = "zero"
    """Of the head, where the folder has none."""

    def check_folder(self) -> HFFolder:
        return check_scalar_folder(self.path)

    def load_model(self) -> Any:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return load_scalar_model(
            self.path,
            head_init=self.head_init,
            pad_token_id=end if pad is None else pad,
            dtype=self.dtype,
            device=self.context.device,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def vocabulary_size(self) -> int:
        """0: a probe compares logprobs, and this model has none; its weights have a digest."""
        return 0

    # ---- scores ---------------------------------------------------------------------------

    def scores_of(self, data: Batch) -> Tensor:  # [T]
        """Before each response token of one micro-batch, with gradient where the mode has one."""
        prompts = [*column(data, "prompt_ids", self.name)]
        responses = [*column(data, "response_ids", self.name)]
        return response_scores(self.model, prompts, responses, groups_of(data), layout=self.layout)

    def last_scores_of(self, data: Batch) -> Tensor:  # [B]
        """At the last token of each response of one micro-batch, with gradient likewise."""
        prompts = [*column(data, "prompt_ids", self.name)]
        responses = [*column(data, "response_ids", self.name)]
        return last_scores(self.model, prompts, responses, groups_of(data), layout=self.layout)

    def all_scores(self, data: Batch, *, ends: bool = False) -> list[Tensor]:  # B of [r]
        """Before each response token of all rows, without gradient, in micro-batches; with `ends`
        [r + 1], as after the last one.
        """

        def score(
            prompts: Sequence[Tensor], responses: Sequence[Tensor], groups: Sequence[int] | None
        ) -> Sequence[Tensor]:
            if ends:
                responses = one_longer(responses)
            found = response_scores(self.model, prompts, responses, groups, layout=self.layout)
            return ragged(found.cpu(), [len(r) for r in responses])

        return self.all_rows(data, score)

    def all_last_scores(self, data: Batch) -> list[Tensor]:  # B of []
        """At the last response token of all rows, without gradient, in micro-batches."""

        def score(
            prompts: Sequence[Tensor], responses: Sequence[Tensor], groups: Sequence[int] | None
        ) -> Sequence[Tensor]:
            found = last_scores(self.model, prompts, responses, groups, layout=self.layout)
            return found.cpu().unbind()

        return self.all_rows(data, score)
