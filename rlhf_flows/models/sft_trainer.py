"""`SFTTrainer`: supervised fine-tuning of a causal model on demonstrations.

Rows have a prompt (text or chat messages) and a completion, or an answer; the loss is on the
completion's tokens alone. It runs on the same pass as GRPO: prompt and completion beside each
other, no padding in any projection, the head on completion positions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.sft import nll
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.data.prompts import PromptDataset
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm import DType, check_model_folder, load_tokenizer
from rlhf_flows.models.causal_lm_module import column, flat, ragged
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import OptimizerSettings, SFTSettings

__all__ = ["DemonstrationDataset", "SFTTrainer"]


class SFTTrainer(CausalLMTrainer):
    """Trains on batches with prompt_ids and response_ids."""

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
    ) -> None:
        """As `CausalLMTrainer`; the schedule and its horizon are in `optimizer`."""
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

    def validate_rows(self, rows: Sequence[Any], *, is_eval: bool = False) -> None:
        """Tokenizes every row, so that a bad one is found at the start. Raises DataError."""
        dataset = self.build_dataset(rows, is_eval)
        for index in range(len(dataset)):
            dataset[index]

    def build_dataset(
        self, prompts: Sequence[Mapping[str, Any]], is_eval: bool = False
    ) -> DemonstrationDataset:
        limit = check_model_folder(self.path).max_positions
        return DemonstrationDataset(
            prompts,
            # Not kept: in the user's program, where rows are checked, it would travel with the
            # module to its workers.
            self.tokenizer or load_tokenizer(self.path),
            max_tokens=min(limit, self.sft.max_tokens or limit),
            chat_template=self.chat_template,
            append_eos=self.sft.append_eos,
        )

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


class DemonstrationDataset(Dataset[dict[str, Any]]):
    """Row i as {prompt, prompt_ids, completion, response_ids} and its other columns."""

    collate_fn = None

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        max_tokens: int,
        chat_template: bool | None = None,
        append_eos: bool = True,
    ) -> None:
        """Raises DataError for no rows, or a row without a completion."""
        for number, row in enumerate(rows):
            _completion(row, number)
        self._prompts = PromptDataset(
            rows,
            tokenizer,
            max_prompt_tokens=max_tokens,
            chat_template=chat_template,
            reserved=(),
        )
        self._rows = rows
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._append_eos = append_eos and tokenizer.eos_token_id is not None

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError naming the row where it is empty or longer than allowed."""
        item = self._prompts[index]
        text = _completion(self._rows[index], index)
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._append_eos:
            ids.append(self._tokenizer.eos_token_id)
        if not ids:
            raise DataError(f"the completion of row {index} has no tokens: {text!r}")
        total = len(item["prompt_ids"]) + len(ids)
        if total > self._max_tokens:
            raise DataError(
                f"row {index} has {total} tokens, prompt and completion together, the limit is"
                f" {self._max_tokens}: shorten it, or raise sft.max_tokens if the model takes more"
            )
        return {**item, "completion": text, "response_ids": torch.tensor(ids, dtype=torch.int64)}


def _completion(row: Mapping[str, Any], number: int) -> str:
    text = row.get("completion", row.get("answer"))
    if not isinstance(text, str):
        found = "neither" if text is None else f"a {type(text).__name__}"
        raise DataError(
            f"row {number} needs a text under 'completion' or 'answer' to learn from, found"
            f" {found} among {sorted(row)}"
        )
    return text
