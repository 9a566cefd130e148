"""`SFTTrainer`: supervised fine-tuning of a causal model on demonstrations.

Rows have a prompt (text or chat messages) and a completion, or an answer; the loss is on the
completion's tokens alone. It runs on the same pass as GRPO: prompt and completion beside each
other, no padding in any projection, the head on completion positions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.sft import nll
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.models.causal_lm import DType, check_model_folder
from rlhf_flows.models.causal_lm_module import column, flat, ragged
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.dataset_role import DatasetType, MakesDataset
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import OptimizerSettings, SFTSettings

__all__ = ["SFTTrainer"]


class SFTTrainer(MakesDataset, CausalLMTrainer):
    """Trains on batches with prompt_ids and response_ids."""

    dataset_kind = "prompt_answer"
    token_columns = ("prompt_ids", "response_ids")

    def __init__(
        self,
        name: str = "trainer",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        sft: SFTSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        chat_template: bool | None = None,
        layout: Layout = "auto",
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
    ) -> None:
        """As `CausalLMTrainer`; the schedule and its horizon are in `optimizer`.

        `dataset` makes items of the rows, `prompt_answer` if not given: a name
        (`register_dataset`), `package.module:Class`, or a class; `dataset_args` are its arguments.
        """
        super().__init__(
            name,
            path=path,
            optimizer=optimizer,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            layout=layout,
        )
        self.sft = sft or SFTSettings()
        self.chat_template = chat_template
        self.choose_dataset(dataset, dataset_args)

    def max_tokens_of_item(self, is_eval: bool) -> int:
        limit = check_model_folder(self.path).max_positions
        return min(limit, self.sft.max_tokens or limit)

    def dataset_defaults(self) -> dict[str, Any]:
        return {"chat_template": self.chat_template, "append_eos": self.sft.append_eos}

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Adds `nll` [B] float32: the mean over each row's completion tokens."""
        logprobs = self.all_logprobs(data, temperature=1.0)
        means = [float(nll(row).mean()) for row in logprobs]
        return {**data, "nll": torch.tensor(means, dtype=torch.float32)}

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `token_weight` (ragged) of the whole global batch."""
        column(data, "prompt_ids", self.name)
        lengths = [len(r) for r in column(data, "response_ids", self.name)]
        counts = torch.tensor(lengths, dtype=torch.int64)
        weights = token_weights(counts, aggregation=self.sft.aggregation)
        return {**data, "token_weight": ragged(weights, lengths)}

    def micro_batches(self, data: Batch) -> list[Batch]:
        """This rank's micro-batches, cut by tokens."""
        return [select(data, part) for part in self.cut(data, range(batch_size(data)))]

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        """Collective: every rank, same order. One optimizer step on one global batch.

        Raises NonFiniteError, weights untouched, where the loss or a gradient is not finite.
        """
        (total, tokens, rows), metrics = self.step_on(data, self._loss, num_sums=3)
        return {"loss": total, "tokens": tokens, "rows_trained": rows, **metrics}

    def _loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the loss; and that with its tokens and rows, [3]."""
        losses = nll(self.logprobs_of(data, temperature=1.0).logprobs)  # [T]
        loss = (flat(data["token_weight"]).to(losses.device) * losses).sum()
        counts = losses.new_tensor([len(losses), batch_size(data)])
        return loss, torch.cat([loss.detach()[None], counts])
