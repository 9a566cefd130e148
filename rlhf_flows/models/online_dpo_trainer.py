"""`OnlineDPOTrainer`: DPO on pairs that the policy sampled itself and a reward ranked (Guo et al.,
arXiv 2402.04792).

The decision here: of each group of siblings the best is set against the worst. A group whose
rewards are all the same says nothing: it is left out, and counted.

Letters: B samples of a global batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm_module import column
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.pairs import pair_costs

__all__ = ["OnlineDPOTrainer"]


class OnlineDPOTrainer(DPOTrainer):
    """Online DPO or IPO on batches with prompt_ids, response_ids, group, reward and
    reference_logprobs; `dpo.temperature` is the sampler's.
    """

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `rival`, the row of a group's worst for its best and None for all others, and
        `is_tied`, whether a row's group has no best; lists of B.
        """
        for name in ("prompt_ids", "response_ids"):
            column(data, name, self.name)
        rewards = torch.as_tensor(column(data, "reward", self.name)).to(torch.float64)
        bad = (~torch.isfinite(rewards)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise DataError(
                f"the reward of row {row} is {float(rewards[row])}, by which nothing can be"
                " ranked: let the reward module return a finite number"
            )
        reference = column(data, "reference_logprobs", self.name)
        for row, (known, response) in enumerate(zip(reference, data["response_ids"], strict=True)):
            if len(known) != len(response):
                raise DataError(
                    f"row {row} has {len(response)} response tokens but {len(known)} values in"
                    " 'reference_logprobs': it needs one per token"
                )
        members: dict[int, list[int]] = {}
        for row, group in enumerate(column(data, "group", self.name)):
            members.setdefault(int(group), []).append(row)
        if members and all(len(rows) == 1 for rows in members.values()):
            raise DataError(
                f"module {self.name!r} compares completions of one prompt, and every prompt of the"
                " batch has one: set runtime.num_inference_per_prompt to 2 or more"
            )
        rival: list[int | None] = [None] * len(rewards)
        is_tied = [False] * len(rewards)
        for rows in members.values():
            # Of equal ones the first: the order of rows is the plan's.
            best = max(rows, key=lambda i: float(rewards[i]))
            worst = min(rows, key=lambda i: float(rewards[i]))
            if rewards[best] > rewards[worst]:
                rival[best] = worst
            else:
                for row in rows:
                    is_tied[row] = True
        return {**data, "rival": rival, "is_tied": is_tied}

    def micro_batches(self, data: Batch) -> list[Batch]:
        """This rank's micro-batches of pairs; on rank 0 the last holds the rows in no pair."""
        pairs = [(best, worst) for best, worst in enumerate(data["rival"]) if worst is not None]
        micro_batches: list[Batch] = []
        if pairs:
            batch = _pair_batch(data, pairs)
            costs = pair_costs(batch, shares_prompts=self.shares_prompts)
            micro_batches = [select(batch, part) for part in self.cut(costs, range(len(pairs)))]
        paired = {row for pair in pairs for row in pair}
        idle = [row for row in range(batch_size(data)) if row not in paired]
        if idle and self.data_parallel_rank == 0:
            micro_batches.append(select(data, idle))
        return micro_batches

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        """Collective: every rank, same order. One optimizer step on one global batch.

        Raises NonFiniteError, weights untouched, where the loss or a gradient is not finite.
        """
        idle = [batch for batch in data if "chosen_ids" not in batch]
        tied = {
            int(group)
            for batch in idle
            for group, is_tied in zip(batch["group"], batch["is_tied"], strict=True)
            if is_tied
        }
        metrics, (filtered, groups_tied) = self._step(
            [batch for batch in data if "chosen_ids" in batch],
            beside=[sum(batch_size(batch) for batch in idle), len(tied)],
        )
        return {
            **metrics,
            "groups_tied": groups_tied,
            "rows_trained": 2 * metrics["pairs"],
            "rows_filtered": filtered,
        }


def _pair_batch(data: Batch, pairs: list[tuple[int, int]]) -> Batch:
    logprobs = [row.sum() for row in data["reference_logprobs"]]
    return {
        "prompt_ids": [data["prompt_ids"][best] for best, _ in pairs],
        "chosen_ids": [data["response_ids"][best] for best, _ in pairs],
        "rejected_ids": [data["response_ids"][worst] for _, worst in pairs],
        "reference_chosen_logprob": torch.stack([logprobs[best] for best, _ in pairs]),
        "reference_rejected_logprob": torch.stack([logprobs[worst] for _, worst in pairs]),
        "pair_weight": torch.full((len(pairs),), 1.0 / len(pairs)),
    }
