"""The role of a policy that generates: which columns it reads, and which it adds.

What VLLMPolicy and TorchPolicy share. The decision here: the sampler is a detail. Both take the
same arguments, read and write the same columns, end completions at the same tokens and cut texts
by the same rule; a run moves from one to the other by its class alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.data.columns import GENERATED_COLUMNS
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.generation import Completion, GenerationSettings, cut_at_stop
from rlhf_flows.models.causal_lm import check_model_folder, load_tokenizer
from rlhf_flows.models.dataset_role import DatasetType, MakesDataset
from rlhf_flows.models.families import FamilyCarrier
from rlhf_flows.modules.hf_folder import HFFolder

__all__ = ["DTYPES", "GeneratingPolicy"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


class GeneratingPolicy(FamilyCarrier, MakesDataset):
    """A policy that completes prompts; a sampler's class gives it `generate` and `setup`."""

    generates: ClassVar[bool] = True
    dataset_kind = "prompt"
    token_columns = ("prompt_ids",)
    written_columns = GENERATED_COLUMNS - {"prompt_ids"}

    def __init__(
        self,
        name: str = "policy",
        *,
        path: str | Path,
        generation: GenerationSettings | None = None,
        eval_generation: GenerationSettings | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        chat_template: bool | None = None,
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
        eval_dataset: DatasetType = None,
        eval_dataset_args: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            path: a local Hugging Face folder: model and tokenizer.
            generation: how to sample in `forward_step`.
            eval_generation: how to sample in `eval_step`; as in `forward_step` if not given.
            dtype: precision of the weights; `auto` is that of the folder.
            max_model_len: most tokens of prompt and completion together; the model's own limit
                if not given.
            chat_template: whether prompts go through the tokenizer's chat template; if not given,
                those that are lists of messages do.
            dataset: what makes items of the rows, `prompt` if not given: a name
                (`register_dataset`), `package.module:Class`, or a class.
            dataset_args: its arguments.
            eval_dataset: the same of an evaluation's rows; as `dataset` if not given, with its
                arguments.
            eval_dataset_args: its arguments, where it is given.
        """
        super().__init__(name)
        self.path = Path(path).expanduser().absolute()
        self.generation = generation or GenerationSettings()
        self.eval_generation = eval_generation or self.generation
        self.dtype = dtype
        self.max_model_len_asked = max_model_len
        self.chat_template = chat_template
        self.choose_dataset(
            dataset, dataset_args, eval_dataset=eval_dataset, eval_args=eval_dataset_args
        )

    # ---- before anything starts ---------------------------------------------------------------

    def validate(self) -> None:
        """Checks the folder, the precision and the lengths; loads nothing."""
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype of module {self.name!r} is {self.dtype!r}, expected one of"
                f" {', '.join(DTYPES)}"
            )
        check_model_folder(self.path)
        folder = HFFolder(self.path)
        asked = self.max_model_len_asked
        if asked is not None and asked > folder.max_positions:
            raise ConfigError(
                f"max_model_len of module {self.name!r} is {asked}, but the model in"
                f" {str(self.path)!r} takes at most {folder.max_positions} tokens: lower it"
            )
        limit = asked or folder.max_positions
        for settings in (self.generation, self.eval_generation):
            if settings.max_new_tokens >= limit:
                raise ConfigError(
                    f"max_new_tokens of module {self.name!r} is {settings.max_new_tokens}, which"
                    f" leaves no room for a prompt within {limit} tokens (max_model_len): lower"
                    " max_new_tokens" + (" or raise max_model_len" if asked else "")
                )

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, loaded when first used."""
        return _tokenizer(self.path)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion: those of the folder and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return HFFolder(self.path).end_token_ids | (frozenset() if own is None else {int(own)})

    @property
    def length_limit(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.max_model_len_asked or HFFolder(self.path).max_positions

    def max_tokens_of_item(self, is_eval: bool) -> int:
        """What the longest completion leaves of the model's limit."""
        settings = self.eval_generation if is_eval else self.generation
        return self.length_limit - settings.max_new_tokens

    def dataset_defaults(self) -> dict[str, Any]:
        return {"chat_template": self.chat_template}

    # ---- work ---------------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> list[Completion]:
        """One completion for each prompt, in order, each drawn with its own seed."""
        raise NotImplementedError(f"{type(self).__name__} is a policy without a sampler")

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Adds `response_ids`, `behaviour_logprobs`, `completion` and `finish_reason`.

        Reads `prompt_ids` (ragged, or [B, T]) and `seed` [B].
        """
        return self._complete(data, self.generation)

    def eval_step(self, data: Batch) -> Batch:
        """As `forward_step`, by the settings for evaluation."""
        return self._complete(data, self.eval_generation)

    def _complete(self, data: Batch, settings: GenerationSettings) -> Batch:
        completions = self.generate(
            _integer_rows(_column(data, "prompt_ids", self.name)),
            seeds=[int(s) for s in _column(data, "seed", self.name)],
            settings=settings,
        )
        decode = self.tokenizer.decode
        texts = [decode(list(c.ids), skip_special_tokens=True) for c in completions]
        return {
            **data,
            "response_ids": [torch.tensor(c.ids, dtype=torch.int64) for c in completions],
            "behaviour_logprobs": [
                torch.tensor(c.logprobs, dtype=torch.float32) for c in completions
            ],
            "completion": [cut_at_stop(text, settings.stop) for text in texts],
            "finish_reason": [c.finish_reason for c in completions],
        }


@cache
def _tokenizer(path: Path) -> Any:
    # Kept beside the modules, not in them: a module is its arguments, before and after its use.
    return load_tokenizer(path)


def _column(data: Mapping[str, Any], key: str, module: str) -> Any:
    if key not in data:
        raise DataError(
            f"module {module!r} needs the column {key!r} to sample, and the batch has"
            f" {sorted(data)}: prompts come from its build_dataset, seeds from the plan"
        )
    return data[key]


def _integer_rows(column: Iterable[Any]) -> list[list[int]]:
    return [row.tolist() if isinstance(row, Tensor) else [int(i) for i in row] for row in column]
