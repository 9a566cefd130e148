"""Preferences: rows of a prompt with a better and a worse completion, and their tokens.

The decision here: an item is one pair. Rows that list several pairs of a prompt are opened up when
the dataset is made, so that what is planned, counted and resumed is a pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_flows.data.prompts import PromptDataset
from rlhf_flows.errors import DataError

__all__ = ["PreferenceDataset", "pair_rows"]

_RESERVED = (
    "prompt_ids", "chosen_ids", "rejected_ids",
    "reference_chosen_logprob", "reference_rejected_logprob",
)  # fmt: skip
"""What a run writes beside a preference."""
_LISTS = ("pos_answers", "neg_answers")


def pair_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair a row {prompt, chosen, rejected} with the row's other columns.

    A row {prompt, pos_answers, neg_answers} (ReaL's) gives a row for each place of the two lists,
    which are pairs one to one; a row that is a pair already stays as it is.
    Raises DataError naming the row.
    """
    pairs: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        others = {name: value for name, value in row.items() if name not in _LISTS}
        better, worse = (row.get(name) for name in _LISTS)
        if better is None and worse is None:
            pairs.append(others)
            continue
        if not isinstance(better, list) or not isinstance(worse, list) or not better:
            raise DataError(
                f"row {number} needs lists of texts under 'pos_answers' and 'neg_answers', found"
                f" {_kind(better)} and {_kind(worse)}"
            )
        if len(better) != len(worse):
            raise DataError(
                f"row {number} has {len(better)} pos_answers and {len(worse)} neg_answers: they"
                " are pairs, the first with the first, so give as many of each"
            )
        for chosen, rejected in zip(better, worse, strict=True):
            pairs.append({**others, "chosen": chosen, "rejected": rejected})
    return pairs


class PreferenceDataset(Dataset[dict[str, Any]]):
    """Pair i as {prompt, prompt_ids, chosen, chosen_ids, rejected, rejected_ids} and the other
    columns of its row. Rows are what `pair_rows` takes.
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
        """Raises DataError for no rows, or one that is no pair."""
        pairs = pair_rows(rows)
        for number, pair in enumerate(pairs):
            _check_pair(pair, number)
        self._prompts = PromptDataset(
            pairs,
            tokenizer,
            max_prompt_tokens=max_tokens,
            chat_template=chat_template,
            reserved=_RESERVED,
        )
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._append_eos = append_eos and tokenizer.eos_token_id is not None

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError naming the pair where it is empty or longer than allowed."""
        item = self._prompts[index]
        for name in ("chosen", "rejected"):
            ids = self._ids(item[name])
            total = len(item["prompt_ids"]) + len(ids)
            if not len(ids):
                raise DataError(f"the {name} completion of pair {index} has no tokens")
            if total > self._max_tokens:
                raise DataError(
                    f"pair {index} has {total} tokens, prompt and {name} completion together, the"
                    f" limit is {self._max_tokens}: shorten it, or raise max_tokens if the model"
                    " takes more"
                )
            item[f"{name}_ids"] = ids
        return item

    def check(self) -> None:
        """Tokenizes every row, so that a bad one is found at the start. Raises DataError."""
        for index in range(len(self)):
            self[index]

    def _ids(self, text: str) -> Tensor:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._append_eos:
            ids.append(self._tokenizer.eos_token_id)
        return torch.tensor(ids, dtype=torch.int64)


def _check_pair(row: Mapping[str, Any], number: int) -> None:
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            raise DataError(
                f"pair {number} needs a text under {name!r}, found {_kind(row.get(name))} among"
                f" {sorted(row)}: a preference is {{prompt, chosen, rejected}}"
            )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
