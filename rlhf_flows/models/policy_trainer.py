"""`PolicyTrainer`: trains a causal model by GRPO, in any of the variants of `GRPOSettings`.

The decision here: all that needs the whole global batch (advantages, the weight of every token) is
computed once in `prepare_batch`, so that the loss is a plain sum over tokens; any cut into
micro-batches, over any number of ranks, gives the same gradient. Rows without a gradient (groups of
equal reward without a KL term, masked completions) go through no forward pass.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlhf_flows.algorithms.advantages import group_advantages
from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.grpo import policy_loss
from rlhf_flows.algorithms.importance import importance_weights
from rlhf_flows.algorithms.kl import kl_estimate
from rlhf_flows.algorithms.truncation import apply_truncation
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_module import column, flat, ragged
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import GRPOSettings, OptimizerSettings

__all__ = ["PolicyTrainer"]

_SUMS = (
    "loss", "policy_loss", "kl", "clip_fraction", "ratio", "entropy", "importance_weight",
    "logprob_gap", "tokens", "gap_tokens", "rows_trained", "rows_filtered",
)  # fmt: skip
"""What micro-batches add up, the loss first; those from "kl" to "logprob_gap" are over tokens."""


class PolicyTrainer(CausalLMTrainer):
    """GRPO on batches with prompt_ids, response_ids, reward and group.

    With `kl_coef` also reference_logprobs; with an importance correction, or old logprobs from the
    sampler, also behaviour_logprobs; with truncation "mask" or "penalize" also finish_reason.
    """

    def __init__(
        self,
        name: str = "trainer",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        grpo: GRPOSettings | None = None,
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
        self.grpo = grpo or GRPOSettings()

    # ---- before the passes ----------------------------------------------------------------

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `advantage` [B] and `token_weight` (ragged) of the whole global batch."""
        grpo, size = self.grpo, batch_size(data)
        self._check(data)
        rewards, trained = torch.as_tensor(data["reward"]), torch.ones(size, dtype=torch.bool)
        if grpo.truncation != "keep":
            reasons = column(data, "finish_reason", self.name)
            truncated = torch.tensor([reason == "length" for reason in reasons], dtype=torch.bool)
            rewards, trained = apply_truncation(
                rewards, truncated, kind=grpo.truncation, penalty=grpo.truncation_penalty
            )
        advantages = group_advantages(
            rewards,
            torch.as_tensor(data["group"]),
            normalize=grpo.advantage_normalization,
            eps=grpo.advantage_eps,
        )
        lengths = [len(r) for r in data["response_ids"]]
        counts = torch.tensor(lengths, dtype=torch.int64)
        weights = token_weights(
            counts,
            aggregation=grpo.aggregation,
            max_length=grpo.max_length,
            mask=torch.repeat_interleave(trained, counts),
        )
        return {**data, "advantage": advantages, "token_weight": ragged(weights, lengths)}

    def wants_episode(self, num_updates: int) -> bool:
        """With one update, old and current policy are the same, and no pass is needed."""
        return num_updates > 1 and self.grpo.old_logprobs == "trainer"

    def before_updates(self, batches: list[Batch]) -> list[Batch]:
        """Adds `old_logprobs`, before the first step of an episode of several.

        The first batch is trained while the policy is still the old one, so it has none. Samples
        that come again in a later epoch are computed once.
        """
        if not self.wants_episode(len(batches)):
            return batches
        return [batches[0], *self.compute_old_logprobs(batches[1:])]

    def compute_old_logprobs(self, batches: list[Batch]) -> list[Batch]:
        """The batches with `old_logprobs` (ragged) under the weights as they are now."""
        known: dict[str, Tensor] = {}
        done: list[Batch] = []
        for data in batches:
            ids = [str(i) for i in data["sample_id"]] if "sample_id" in data else None
            if ids is None:
                old = self.all_logprobs(data, temperature=self.grpo.temperature)
            else:
                new = [i for i, sample in enumerate(ids) if sample not in known]
                if new:
                    found = self.all_logprobs(select(data, new), temperature=self.grpo.temperature)
                    known.update(zip((ids[i] for i in new), found, strict=True))
                old = [known[sample] for sample in ids]
            done.append({**data, "old_logprobs": old})
        return done

    def micro_batches(self, data: Batch) -> list[Batch]:
        """This rank's micro-batches, cut by tokens; on rank 0 the last holds what has no gradient,
        so that every row is in exactly one.
        """
        active = self._has_gradient(data)
        rows = [i for i, yes in enumerate(active) if yes]
        parts = self.cut(data, rows)
        idle = [i for i, yes in enumerate(active) if not yes]
        if idle and self.data_parallel_rank == 0:
            parts.append(idle)
        return [select(data, part) for part in parts]

    def _has_gradient(self, data: Batch) -> list[bool]:
        weighs = [bool((w != 0).any()) for w in data["token_weight"]]
        if self.grpo.kl_coef > 0:
            return weighs
        advantages = data["advantages"] if "advantages" in data else data["advantage"]
        return [w and bool((a != 0).any()) for w, a in zip(weighs, advantages, strict=True)]

    def _check(self, data: Batch) -> None:
        for name in ("prompt_ids", "response_ids", "reward", "group"):
            column(data, name, self.name)
        needed = []
        if self.grpo.kl_coef > 0:
            needed.append("reference_logprobs")
        if self.grpo.importance != "none" or self.grpo.old_logprobs == "behaviour":
            needed.append("behaviour_logprobs")
        for name in needed:
            values = column(data, name, self.name)
            for i, (value, response) in enumerate(zip(values, data["response_ids"], strict=True)):
                if len(value) != len(response):
                    raise DataError(
                        f"row {i} has {len(response)} response tokens but {len(value)} values in"
                        f" {name!r}: it needs one per token"
                    )

    # ---- the step -------------------------------------------------------------------------

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        """Collective: every rank, same order. One optimizer step on one global batch.

        None is taken where the mean ratio of its tokens exceeds `early_stop_ratio`; its rows then
        count as filtered. Raises NonFiniteError, weights untouched, where the loss or a gradient is
        not finite.
        """
        device = self.context.device
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        max_gap = torch.zeros((), device=device)
        active = [any(self._has_gradient(micro_batch)) for micro_batch in data]
        found_parts = self.backward_all(
            [batch for batch, yes in zip(data, active, strict=True) if yes], self._loss
        )
        for part, gap in found_parts:
            sums += part
            max_gap = torch.maximum(max_gap, gap)
        idle = [batch_size(batch) for batch, yes in zip(data, active, strict=True) if not yes]
        sums[_SUMS.index("rows_filtered")] += sum(idle)
        sums, metrics = self.optimizer_step(sums)
        if self.world_size > 1:
            torch.distributed.all_reduce(max_gap, torch.distributed.ReduceOp.MAX)
        found = dict(zip(_SUMS, sums.tolist(), strict=True))
        tokens, gap_tokens = found["tokens"], found.pop("gap_tokens")
        for name in _SUMS[_SUMS.index("kl") : _SUMS.index("logprob_gap")]:
            found[name] /= max(tokens, 1.0)
        found["logprob_gap"] /= max(gap_tokens, 1.0)
        found["logprob_gap_max"] = float(max_gap)
        if not any("reference_logprobs" in micro_batch for micro_batch in data):
            del found["kl"]
        if self.grpo.early_stop_ratio is None:
            return {**found, **metrics}
        is_stopped = self.refuses(sums)
        if is_stopped:
            found["rows_filtered"] += found["rows_trained"]
            found["rows_trained"] = 0.0
            # A ratio that was too large for a number made a loss that is none: nobody steps by it.
            found = {name: x for name, x in found.items() if math.isfinite(x)}
        return {**found, "early_stopped": float(is_stopped), **metrics}

    def refuses(self, sums: Tensor) -> bool:
        limit = self.grpo.early_stop_ratio
        if limit is None:
            return False
        ratio, tokens = sums[_SUMS.index("ratio")], sums[_SUMS.index("tokens")]
        return bool(ratio > limit * tokens)

    def _loss(self, data: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """This micro-batch's share of the loss; what it adds to `_SUMS`, and its largest gap."""
        grpo, device = self.grpo, self.context.device
        lengths = torch.tensor([len(r) for r in data["response_ids"]])
        scored = self.logprobs_of(data, temperature=grpo.temperature, entropy=grpo.exact_entropy)
        logprobs, now = scored.logprobs, scored.logprobs.detach()
        weights = flat(data["token_weight"]).to(device)
        advantages = _of_tokens(data, lengths).to(device)
        behaviour = None
        if "behaviour_logprobs" in data:
            behaviour = flat(data["behaviour_logprobs"]).to(device)
        if grpo.old_logprobs == "behaviour":
            assert behaviour is not None
            old = behaviour
        elif "old_logprobs" in data:
            old = flat(data["old_logprobs"]).to(device)
        else:
            old = now
        policy = policy_loss(
            logprobs, old, advantages, clip_low=grpo.clip_low, clip_high=grpo.clip_high
        )
        token_loss = policy.loss
        importance = torch.ones_like(now)
        if grpo.importance != "none":
            assert behaviour is not None
            importance = importance_weights(
                old, behaviour, lengths, kind=grpo.importance, cap=grpo.importance_cap
            )
            token_loss = token_loss * importance
        policy_share = (weights * token_loss.detach()).sum()
        kl = torch.zeros_like(now)
        if "reference_logprobs" in data:
            kl = kl_estimate(
                logprobs if grpo.kl_coef > 0 else now,
                flat(data["reference_logprobs"]).to(device),
                kind=grpo.kl_estimator,
            )
        if grpo.kl_coef > 0:
            token_loss = token_loss + grpo.kl_coef * kl
        loss = (weights * token_loss).sum()
        # Of one policy, in two engines: what the trainer has learned since is no gap.
        sampled = now if grpo.old_logprobs == "behaviour" else old
        gap = torch.zeros(1, device=device) if behaviour is None else (sampled - behaviour).abs()
        entropy = -now if scored.entropy is None else scored.entropy
        sums = [
            loss.detach(), policy_share, kl.detach().sum(), policy.clipped.sum(),
            policy.ratio.sum(), entropy.sum(), importance.sum(), gap.sum(),
        ]  # fmt: skip
        counts = [len(now), 0 if behaviour is None else len(now), batch_size(data), 0]
        part = torch.cat(
            [
                torch.stack([s.to(torch.float64) for s in sums]),
                torch.tensor(counts, dtype=torch.float64, device=device),
            ]
        )
        return loss, (part, gap.max())


def _of_tokens(data: Batch, lengths: Tensor) -> Tensor:  # [T]
    """The advantage of each token: its own where there is one, else its sample's."""
    if "advantages" in data:
        return flat(data["advantages"])
    return torch.repeat_interleave(data["advantage"], lengths)
