"""`DPOTrainer`: trains a policy on preferences, without a reward model (arXiv 2305.18290).

The decision here: as in `RewardTrainer`, a pair is computed together, and its weight is one over
the pairs of the global batch; what the reference says of it was computed once, in scoring.

Letters: B pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_flows.algorithms.dpo import dpo_loss
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.pairs import as_samples, check_pair_batch, pair_costs, sums_of
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import DPOSettings, OptimizerSettings

__all__ = ["DPOTrainer"]

_MEANS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob")
"""Over pairs; rewards are the implicit ones, beta * log(policy / reference)."""


class DPOTrainer(CausalLMTrainer):
    """DPO or IPO on batches with prompt_ids, chosen_ids, rejected_ids, reference_chosen_logprob and
    reference_rejected_logprob.
    """

    def __init__(
        self,
        name: str = "ppo_policy",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        dpo: DPOSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        layout: Layout = "auto",
    ) -> None:
        """As `CausalLMTrainer`, with the settings of the algorithm."""
        super().__init__(
            name,
            path=path,
            optimizer=optimizer,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            layout=layout,
        )
        self.dpo = dpo or DPOSettings()

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `pair_weight` [B] of the whole global batch."""
        check_pair_batch(data, self.name, "reference_chosen_logprob", "reference_rejected_logprob")
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
        metrics, _ = self._step(data)
        return {**metrics, "rows_trained": metrics.pop("pairs")}

    def _step(
        self, data: list[Batch], *, beside: Sequence[float] = ()
    ) -> tuple[dict[str, float], list[float]]:
        """One step on pairs; its metrics with the number of `pairs`, and `beside` summed over
        ranks.
        """
        num_sums = 3 + len(_MEANS)
        sums, metrics = self.step_on(data, self._loss, beside=beside, num_sums=num_sums)
        loss, pairs, tokens = sums[:3]
        means = {n: x / max(pairs, 1.0) for n, x in zip(_MEANS, sums[3:num_sums], strict=True)}
        found = {"loss": loss, **means, "tokens": tokens, "pairs": pairs, **metrics}
        return found, sums[num_sums:]

    def _loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the loss; and its sums: loss, pairs, tokens, `_MEANS`."""
        samples = as_samples(data)
        scored = self.logprobs_of(samples, temperature=self.dpo.temperature).logprobs
        chosen, rejected = sums_of(scored, samples).view(-1, 2).unbind(1)
        found = dpo_loss(
            chosen,
            rejected,
            torch.as_tensor(data["reference_chosen_logprob"]).to(chosen),
            torch.as_tensor(data["reference_rejected_logprob"]).to(chosen),
            beta=self.dpo.beta,
            kind=self.dpo.kind,
            label_smoothing=self.dpo.label_smoothing,
        )
        losses = found.loss
        if self.dpo.sft_coef:
            lengths = torch.tensor([len(ids) for ids in data["chosen_ids"]]).to(chosen)
            losses = losses - self.dpo.sft_coef * chosen / lengths
        loss = (data["pair_weight"].to(chosen.device) * losses).sum()
        distance = found.chosen_rewards - found.rejected_rewards
        sums = [
            loss.detach(), scored.new_tensor(len(chosen)), scored.new_tensor(len(scored)),
            (distance > 0).sum(), distance.sum(), found.chosen_rewards.sum(),
            found.rejected_rewards.sum(), chosen.detach().sum(),
        ]  # fmt: skip
        return loss, torch.stack([s.to(torch.float64) for s in sums])
