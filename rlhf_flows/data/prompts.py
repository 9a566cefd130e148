"""Prompt files: read, checked and tokenized before anything expensive starts.

The decision here: rows are checked in full when they are loaded, and a mistake is reported with the
line it stands on. A row is a dict whose "prompt" is text or a list of chat messages; its other
columns travel with every sample to the reward function and into Parquet, so they may hold only
what a column can (column_codec.py). Any Hugging Face tokenizer serves; transformers is not
imported here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset

from rlhf_flows.data.arrow import to_arrow
from rlhf_flows.data.batch import collate
from rlhf_flows.data.columns import GENERATED_COLUMNS
from rlhf_flows.data.row_sequences import columns_of, indices_to_check, where_of
from rlhf_flows.data.row_types import uniform_rows
from rlhf_flows.data.rows import check_prompt, load_rows, rows_digest
from rlhf_flows.errors import DataError

__all__ = ["PromptDataset", "check_prompt", "load_rows", "prompt_text", "rows_digest"]


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class PromptDataset(Dataset[dict[str, Any]]):
    """Row i as {prompt: rendered text, prompt_ids: int64 [T], and the row's other columns}."""

    collate_fn = None
    """The default collation (`rlhf_flows.data.collate`) is what a module should use."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        chat_template: bool | None = None,
        reserved: Collection[str] = GENERATED_COLUMNS,
    ) -> None:
        """`max_tokens`: most of a prompt. `chat_template`: see `prompt_text`. `reserved`: names
        that rows may not use, because the run writes columns of that name; () where nothing is
        generated, as in supervised training.

        Raises DataError for no rows, a reserved name, or a column of two types.
        """
        if not rows:
            raise DataError("a prompt dataset without rows was asked for: give at least one prompt")
        columns = columns_of(rows)
        for number, names in enumerate(rows if columns is None else [columns]):
            taken = sorted(set(names) & set(reserved))
            if taken:
                raise DataError(
                    f"{where_of(rows, number)} has a column {taken[0]!r}, which the run itself "
                    "writes: rename it in the prompt file (docs/columns.md lists the names in use)"
                )
        self.where = partial(where_of, rows)
        """Names a row in messages."""
        self.rows = uniform_rows(rows, where=self.where) if columns is None else rows
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.chat_template = chat_template

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError naming the row for a prompt without tokens, or with too many."""
        row = self.rows[index]
        where = self.where(index)
        text = prompt_text(
            row, tokenizer=self.tokenizer, chat_template=self.chat_template, where=where
        )
        # A chat template writes the special tokens itself; a second BOS would be a token too many.
        plain = isinstance(row["prompt"], str) and not self.chat_template
        ids: Tensor = torch.tensor(  # [T]
            self.tokenizer(text, add_special_tokens=plain)["input_ids"], dtype=torch.int64
        )
        if not 0 < len(ids) <= self.max_tokens:
            raise DataError(
                f"the prompt of {where} has {len(ids)} tokens, the limit is "
                f"{self.max_tokens}: shorten it, or raise the limit if the model takes more"
                if len(ids)
                else f"the prompt of {where} has no tokens: the tokenizer makes nothing of {text!r}"
            )
        others = {name: value for name, value in row.items() if name != "prompt"}
        return {"prompt": text, "prompt_ids": ids, **others}

    def check(self) -> int:
        """Tokenize the rows (of a large file, some of them) and see that their columns can be
        stored, so that a bad one is found at the start; the longest prompt, in tokens."""
        longest = 0
        others: list[Any] = []
        for index in indices_to_check(self.rows, len(self)):
            item = self[index]
            longest = max(longest, len(item.pop("prompt_ids")))
            others.append(item)
        to_arrow(collate(others))
        return longest


def prompt_text(
    row: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    chat_template: bool | None = None,
    where: str = "row",
) -> str:
    """The prompt of a row as the model is to see it.

    `chat_template` None: messages go through the tokenizer's template, text stays as it is. True:
    text becomes the message of a user first. False: no template; messages are refused.
    Raises DataError, beginning with `where`, for a prompt or a template that does not fit.
    """
    prompt = check_prompt(row, where=where)
    if isinstance(prompt, str):
        if not chat_template:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if chat_template is False:
        raise DataError(
            f"{where}: the prompt is a list of chat messages, and chat_template is false: "
            "give the prompt as text, or leave chat_template out"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the prompt needs a chat template, and the model's tokenizer has none: "
            "give the prompt as text, or use a model tuned for chat"
        )
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except TemplateError as e:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses the messages ({e}); their roles are "
            f"{', '.join(m['role'] for m in prompt)}"
        ) from e
    return str(text)
