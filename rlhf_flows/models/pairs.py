"""Pairs of completions as samples: chosen and rejected beside each other, their prompt shared.

Letters: B pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch, batch_size
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm_module import CausalLMModule, ragged
from rlhf_flows.models.dataset_role import MakesDataset
from rlhf_flows.settings import DPOSettings, RewardModelSettings

__all__ = ["MakesPairs", "as_samples", "check_pair_batch", "pair_costs", "sums_of"]

_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class MakesPairs(MakesDataset, CausalLMModule):
    """A module whose dataset are preferences."""

    dataset_kind = "rw_pair"
    token_columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    chat_template: bool | None = None

    def pair_settings(self) -> DPOSettings | RewardModelSettings:
        raise NotImplementedError

    def max_tokens_of_item(self, is_eval: bool) -> int:
        limit = self.check_folder().max_positions
        return min(limit, self.pair_settings().max_tokens or limit)

    def dataset_defaults(self) -> dict[str, Any]:
        return {"chat_template": self.chat_template, "append_eos": self.pair_settings().append_eos}


def check_pair_batch(data: Batch, module: str, *more: str) -> None:
    """Raises DataError where a column of pairs, or one of `more`, is missing."""
    for name in (*_COLUMNS, *more):
        if name not in data:
            maker = (
                "PreferenceReference makes the reference's columns"
                if name in more
                else ("they come from preferences, rows {prompt, chosen, rejected}")
            )
            raise DataError(
                f"module {module!r} needs the column {name!r}, and the batch has {sorted(data)}:"
                f" {maker}"
            )


def as_samples(data: Batch) -> Batch:
    """2 B samples: chosen and rejected of the first pair, of the second, …, each pair a group."""
    pairs = zip(data["chosen_ids"], data["rejected_ids"], strict=True)
    return {
        "prompt_ids": [prompt for prompt in data["prompt_ids"] for _ in range(2)],
        "response_ids": [response for pair in pairs for response in pair],
        "group": torch.arange(batch_size(data)).repeat_interleave(2),
    }


def pair_costs(data: Batch, *, shares_prompts: bool = True) -> Batch:
    """Pairs as what `CausalLMTrainer.cut` takes, so that none is torn; each with its prompt once,
    or twice where passes do not share it.
    """
    pairs = zip(data["chosen_ids"], data["rejected_ids"], strict=True)
    times = 1 if shares_prompts else 2
    return {
        "prompt_ids": [torch.cat([prompt] * times) for prompt in data["prompt_ids"]],
        "response_ids": [torch.cat([chosen, rejected]) for chosen, rejected in pairs],
    }


def sums_of(logprobs: Tensor, samples: Batch) -> Tensor:  # [T] -> [2 B]
    """Of the tokens of each sample."""
    parts = ragged(logprobs, [len(r) for r in samples["response_ids"]])
    return torch.stack([part.sum() for part in parts])
