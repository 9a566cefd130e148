"""`RewardTrainer`: learns a reward from preferences (InstructGPT, arXiv 2203.02155, eq. 1).

The decision here: a pair is computed together, its prompt once; the weight of a pair is one over
the pairs of the global batch, so that neither cuts nor ranks change a gradient.

Letters: B pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.algorithms.preference import preference_loss
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.dataset_role import DatasetType
from rlhf_flows.models.pairs import as_samples, check_pair_batch, pair_costs
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.reward_model import RewardScorer
from rlhf_flows.settings import OptimizerSettings, RewardModelSettings

__all__ = ["RewardTrainer"]


class RewardTrainer(CausalLMTrainer, RewardScorer):
    """Trains on batches with prompt_ids, chosen_ids and rejected_ids."""

    def __init__(
        self,
        name: str = "trainer",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        settings: RewardModelSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        chat_template: bool | None = None,
        layout: Layout = "auto",
        dataset: DatasetType = None,
        dataset_args: Mapping[str, Any] | None = None,
    ) -> None:
        """As `CausalLMTrainer`; `path` may be a causal model, or one with a head of one label.

        `dataset` and `dataset_args` are as in `RewardModel`.
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
        self.settings = settings or RewardModelSettings()
        self.chat_template = chat_template
        self.choose_dataset(dataset, dataset_args)

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `pair_weight` [B] of the whole global batch."""
        check_pair_batch(data, self.name)
        if self.settings.use_margin and "margin" not in data:
            raise DataError(
                f"module {self.name!r} was told to use margins, and the batch has {sorted(data)}:"
                " give every row a number 'margin', or leave use_margin out"
            )
        size = batch_size(data)
        return {**data, "pair_weight": torch.full((size,), 1.0 / max(size, 1))}

    def samples_of(self, data: Batch) -> Batch:
        return as_samples(data)

    def micro_batches(self, data: Batch) -> list[Batch]:
        """This rank's micro-batches, cut by tokens; a pair stays together."""
        costs = pair_costs(data, shares_prompts=self.shares_prompts)
        parts = self.cut(costs, range(batch_size(data)))
        return [select(data, part) for part in parts]

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        """Collective: every rank, same order. One optimizer step on one global batch.

        Raises NonFiniteError, weights untouched, where the loss or a gradient is not finite.
        """
        sums, metrics = self.step_on(data, self._loss, num_sums=5)
        total, right, margin, chosen, rows = sums
        return {
            "loss": total,
            "accuracy": right / max(rows, 1.0),
            "margin": margin / max(rows, 1.0),
            "chosen_reward": chosen / max(rows, 1.0),
            "rows_trained": rows,
            **metrics,
        }

    def _loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the loss; and sums over its pairs, [5]."""
        chosen, rejected = self.last_scores_of(as_samples(data)).view(-1, 2).unbind(1)
        margin = None
        if self.settings.use_margin:
            margin = torch.as_tensor(data["margin"]).to(chosen)
        losses = preference_loss(
            chosen, rejected, margin=margin, center_coef=self.settings.center_coef
        )
        loss = (data["pair_weight"].to(losses.device) * losses).sum()
        distance = (chosen - rejected).detach()
        sums = [loss.detach(), (distance > 0).sum(), distance.sum(), chosen.detach().sum()]
        count = torch.tensor([len(losses)], dtype=torch.float64, device=losses.device)
        return loss, torch.cat([torch.stack([s.to(torch.float64) for s in sums]), count])
