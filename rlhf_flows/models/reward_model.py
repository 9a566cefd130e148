"""`RewardModel`: a learnt reward, the score at the last token of a completion.

It reads samples (prompt_ids and response_ids), and pairs of completions for an evaluation: how
often is the better one rewarded more.

Letters: B samples, or pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.dataset_role import DatasetType
from rlhf_flows.models.pairs import MakesPairs, as_samples
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.scalar_model import HeadInit
from rlhf_flows.models.scalar_module import ScalarModule
from rlhf_flows.settings import RewardModelSettings

__all__ = ["RewardModel", "RewardScorer"]


class RewardScorer(MakesPairs, ScalarModule):
    """What `RewardModel` and `RewardTrainer` share: rewards of samples and of pairs."""

    head_init: ClassVar[HeadInit] = "small"

    settings: RewardModelSettings

    def pair_settings(self) -> RewardModelSettings:
        return self.settings

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """Samples get `reward` [B] float32.

        Pairs (with chosen_ids) get `chosen_reward`, `rejected_reward`, `reward_margin`, and
        `accuracy`: 1 where the better completion has the higher reward, each [B] float32.
        """
        if "chosen_ids" not in data:
            return {**data, "reward": torch.stack(self.all_last_scores(data))}
        scores = torch.stack(self.all_last_scores(as_samples(data)))
        chosen, rejected = scores.view(-1, 2).unbind(1)
        return {
            **data,
            "chosen_reward": chosen.clone(),
            "rejected_reward": rejected.clone(),
            "reward_margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
        }


class RewardModel(RewardScorer):
    """Adds `reward` to batches with `prompt_ids` and `response_ids`."""

    def __init__(
        self,
        name: str = "reward",
        *,
        path: str | Path,
        settings: RewardModelSettings | None = None,
        dtype: DType = "float32",
        micro_batch_tokens: int = 8192,
        chat_template: bool | None = None,
        layout: Layout = "auto",
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            path: what a `RewardTrainer` saved, or any Hugging Face folder with a head of one
                label; of a causal model, the start of a reward model that follows its trainer.
            settings: of its trainer: how the completions of pairs are tokenized.
            dataset: what makes items of the rows of an evaluation, `rw_pair` if not given: a name
                (`register_dataset`), `package.module:Class`, or a class.
            dataset_args: its arguments, such as `max_pairs_per_prompt`.
        """
        super().__init__(
            name, path=path, dtype=dtype, micro_batch_tokens=micro_batch_tokens, layout=layout
        )
        self.settings = settings or RewardModelSettings()
        self.chat_template = chat_template
        self.choose_dataset(dataset, dataset_args)

    def setup(self) -> None:
        super().setup()
        self.model.requires_grad_(False)
