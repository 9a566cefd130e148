"""Preferences: rows of a prompt with a better and a worse completion, and their tokens.

The decision here: an item is one pair. Rows that list several pairs of a prompt are counted when
the dataset is made, so that what is planned, counted and resumed is a pair.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_flows.data.prompts import PromptDataset
from rlhf_flows.data.row_sequences import columns_of, indices_to_check, where_of
from rlhf_flows.data.rows import near_name
from rlhf_flows.errors import ConfigError, DataError

__all__ = ["PreferenceDataset", "pair_rows"]

_RESERVED = (
    "prompt_ids", "chosen_ids", "rejected_ids",
    "reference_chosen_logprob", "reference_rejected_logprob",
)  # fmt: skip
"""What a run writes beside a preference."""
_LISTS = ("pos_answers", "neg_answers")
_NAMES = ("chosen", "rejected", *_LISTS)


def pair_rows(
    rows: Sequence[Mapping[str, Any]], *, max_pairs_per_prompt: int | None = None
) -> list[dict[str, Any]]:
    """Every pair a row {prompt, chosen, rejected} with the row's other columns.

    A row {prompt, pos_answers, neg_answers} (ReaL's) gives a row for each place of the two lists,
    which are pairs one to one, the first `max_pairs_per_prompt` of them; a row that is a pair
    already stays as it is. Raises DataError naming the row.
    """
    found = _Pairs(rows, max_pairs_per_prompt)
    return [found[i] for i in range(len(found))]


class _Pairs(Sequence[dict[str, Any]]):
    """The pairs of rows, opened up when they are asked for."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], most: int | None) -> None:
        if most is not None and most < 1:
            raise ConfigError(
                f"max_pairs_per_prompt is {most}: give at least 1, or leave it out for all pairs"
            )
        self.rows = rows
        self._most = most
        self._ends: array[int] | None = None
        """Pairs up to and with each row; None where each row is one."""
        columns = columns_of(rows)
        self.columns = columns and tuple(
            dict.fromkeys(n for n in (*columns, *_NAMES) if n not in _LISTS)
        )
        if columns is not None and not set(_LISTS) & set(columns):
            return
        ends = array("q")
        for number, row in enumerate(rows):
            ends.append((ends[-1] if ends else 0) + self._count(row, number))
        self._ends = ends

    def __len__(self) -> int:
        if self._ends is None:
            return len(self.rows)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        number, place = self.place(range(len(self))[index])
        row = self.rows[number]
        others = {name: value for name, value in row.items() if name not in _LISTS}
        better, worse = (row.get(name) for name in _LISTS)
        if better is None or worse is None:
            return others
        return {**others, "chosen": better[place], "rejected": worse[place]}

    def place(self, index: int) -> tuple[int, int]:
        """The row of a pair, and which of its pairs it is."""
        if self._ends is None:
            return index, 0
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def where(self, index: int) -> str:
        return where_of(self.rows, self.place(index)[0])

    def _count(self, row: Mapping[str, Any], number: int) -> int:
        better, worse = (row.get(name) for name in _LISTS)
        if better is None and worse is None:
            return 1
        where = where_of(self.rows, number)
        if not isinstance(better, list) or not isinstance(worse, list) or not better:
            raise DataError(
                f"{where} needs lists of texts under 'pos_answers' and 'neg_answers', found"
                f" {_kind(better)} and {_kind(worse)}{near_name(_LISTS, row)}"
            )
        if len(better) != len(worse):
            raise DataError(
                f"{where} has {len(better)} pos_answers and {len(worse)} neg_answers: they"
                " are pairs, the first with the first, so give as many of each"
            )
        return len(better) if self._most is None else min(self._most, len(better))


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
        max_pairs_per_prompt: int | None = None,
    ) -> None:
        """`max_tokens`: most of a prompt and one of its completions together.

        Raises DataError for no rows, or one that is no pair; pairs of a large file are looked at
        when they are read.
        """
        self._pairs = _Pairs(rows, max_pairs_per_prompt)
        for index in range(len(self._pairs) if columns_of(rows) is None else 1):
            self._check_pair(self._pairs[index], index)
        self._prompts = PromptDataset(
            self._pairs,
            tokenizer,
            max_tokens=max_tokens,
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
        self._check_pair(item, index)
        for name in ("chosen", "rejected"):
            ids = self._ids(item[name])
            total = len(item["prompt_ids"]) + len(ids)
            if not len(ids):
                raise DataError(f"the {name} completion of {self._name(index)} has no tokens")
            if total > self._max_tokens:
                raise DataError(
                    f"{self._name(index)} has {total} tokens, prompt and {name} completion"
                    f" together, the limit is {self._max_tokens}: shorten it, or allow more where"
                    " the model takes more (max_tokens)"
                )
            item[f"{name}_ids"] = ids
        return item

    def _name(self, index: int) -> str:
        """ "pair 3", with where it stands in a file."""
        in_file = hasattr(self._pairs.rows, "where")
        return f"pair {index} ({self._pairs.where(index)})" if in_file else f"pair {index}"

    def _check_pair(self, row: Mapping[str, Any], index: int) -> None:
        for name in ("chosen", "rejected"):
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"{self._name(index)} needs a text under {name!r}, found"
                    f" {_kind(row.get(name))} among {sorted(row)}: a preference is"
                    f" {{prompt, chosen, rejected}}{near_name(_NAMES, row)}"
                )

    def check(self) -> None:
        """Tokenizes the rows (of a large file, some of them), so that a bad one is found at the
        start. Raises DataError.
        """
        for index in indices_to_check(self._prompts.rows, len(self)):
            self[index]

    def _ids(self, text: str) -> Tensor:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._append_eos:
            ids.append(self._tokenizer.eos_token_id)
        return torch.tensor(ids, dtype=torch.int64)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
