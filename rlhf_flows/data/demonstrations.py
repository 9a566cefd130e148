"""Demonstrations: rows of a prompt with the completion to learn, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from rlhf_flows.data.prompts import PromptDataset
from rlhf_flows.data.row_sequences import columns_of, indices_to_check, where_of
from rlhf_flows.data.row_types import kind_of
from rlhf_flows.data.rows import near_name
from rlhf_flows.errors import DataError

__all__ = ["DemonstrationDataset"]

_TEXTS = ("completion", "answer")


class DemonstrationDataset(Dataset[dict[str, Any]]):
    """Row i as {prompt, prompt_ids, completion, response_ids} and its other columns.

    The completion stands under `completion` or `answer`.
    """

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
        """`max_tokens`: most of prompt and completion together. `chat_template`: see `prompt_text`.

        Raises DataError for no rows, or a row without a completion; rows of a large file are
        looked at when they are read.
        """
        for number in range(len(rows) if columns_of(rows) is None else 1):
            _completion(rows[number], where_of(rows, number))
        self._prompts = PromptDataset(
            rows, tokenizer, max_tokens=max_tokens, chat_template=chat_template, reserved=()
        )
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._append_eos = append_eos and tokenizer.eos_token_id is not None

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError naming the row where it is empty or longer than allowed."""
        item = self._prompts[index]
        where = self._prompts.where(index)
        text = _completion(item, where)
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._append_eos:
            ids.append(self._tokenizer.eos_token_id)
        if not ids:
            raise DataError(f"the completion of {where} has no tokens: {text!r}")
        total = len(item["prompt_ids"]) + len(ids)
        if total > self._max_tokens:
            raise DataError(
                f"{where} has {total} tokens, prompt and completion together, the limit is"
                f" {self._max_tokens}: shorten it, or raise sft.max_tokens if the model takes more"
            )
        return {**item, "completion": text, "response_ids": torch.tensor(ids, dtype=torch.int64)}

    def check(self) -> None:
        """Tokenizes the rows (of a large file, some of them), so that a bad one is found at the
        start. Raises DataError.
        """
        for index in indices_to_check(self._prompts.rows, len(self)):
            self[index]


def _completion(row: Mapping[str, Any], where: str) -> str:
    text = row.get("completion")
    text = row.get("answer") if text is None else text
    if not isinstance(text, str):
        found = "neither" if text is None else kind_of(text)
        raise DataError(
            f"{where} needs a text under 'completion' or 'answer' to learn from, found"
            f" {found} among {sorted(row)}{near_name(_TEXTS, row)}"
        )
    return text
