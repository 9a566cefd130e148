"""What the trainers of PPO learn from: token rewards, advantages and returns of a global batch.

The decision here: policy and value make them by the same function from the same stored columns
(behaviour and reference logprobs, values, rewards), each in its own `prepare_batch`. Nothing has to
be sent between the two, and a training that is repeated finds the same targets.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.gae import generalized_advantages, whiten
from rlhf_flows.algorithms.kl import kl_estimate
from rlhf_flows.algorithms.token_rewards import token_rewards
from rlhf_flows.algorithms.truncation import apply_truncation
from rlhf_flows.data.batch import Batch, batch_size
from rlhf_flows.errors import DataError
from rlhf_flows.models.causal_lm_module import flat
from rlhf_flows.settings import PPOSettings

__all__ = ["PPOTargets", "ppo_targets"]

_MAKERS = {
    "prompt_ids": "the policy (VLLMPolicy, TorchPolicy)",
    "response_ids": "the policy (VLLMPolicy, TorchPolicy)",
    "behaviour_logprobs": "the policy (VLLMPolicy, TorchPolicy)",
    "finish_reason": "the policy (VLLMPolicy, TorchPolicy)",
    "reference_logprobs": "the reference (Reference)",
    "values": "the value model (ValueModel)",
    "last_value": "the value model with the same ppo (ValueModel)",
    "reward": "the reward model (RewardModel), or a reward function (FunctionReward)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTargets:
    lengths: list[int]
    """B: response tokens of each sample."""
    advantages: Tensor
    """[T] whitened over the trained tokens of the batch where the settings say so."""
    returns: Tensor
    """[T] what the values should have been."""
    token_weight: Tensor
    """[T] with loss = (token_weight * token_loss).sum() over the global batch."""
    score: Tensor
    """[B] the reward as it was used: shifted, scaled, with the penalty of truncation, clipped."""
    sequence_kl: Tensor
    """[B] estimated divergence of sampler and reference, summed over the tokens of a sample."""
    first_return: Tensor
    """[B] the return of a sample's first token: of the whole sample."""


def ppo_targets(
    data: Batch, settings: PPOSettings, *, module: str, kl_coef: float | None = None
) -> PPOTargets:
    """Of a whole global batch. `kl_coef` stands in for that of the settings, where it adapts.

    Raises DataError where a column is missing (with the module that makes it), does not have one
    value for each response token, or holds a number that is not finite.
    """
    lengths = [len(r) for r in _column(data, "response_ids", module)]
    _column(data, "prompt_ids", module)
    counts = torch.tensor(lengths, dtype=torch.int64)
    behaviour = _of_tokens(data, "behaviour_logprobs", module)
    reference = behaviour
    if settings.kl_coef > 0 or "reference_logprobs" in data:
        reference = _of_tokens(data, "reference_logprobs", module)
    values = _of_tokens(data, "values", module)
    scores, trained = _scores(data, settings, module)
    rewards = token_rewards(
        scores,
        behaviour,
        reference,
        counts,
        kl_coef=settings.kl_coef if kl_coef is None else kl_coef,
        kl_estimator=settings.kl_estimator,
        score_clip=settings.score_clip,
    )
    found = generalized_advantages(
        rewards,
        values,
        counts,
        gamma=settings.gamma,
        lambda_=settings.lambda_,
        end_values=_end_values(data, module) if settings.bootstrap_truncated else None,
    )
    mask = torch.repeat_interleave(trained, counts)
    advantages = found.advantages
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask=mask)
    kl = kl_estimate(behaviour, reference, kind=settings.kl_estimator)
    sample = torch.repeat_interleave(torch.arange(len(counts)), counts)
    bound = settings.score_clip
    return PPOTargets(
        lengths=lengths,
        advantages=advantages,
        returns=found.returns,
        token_weight=token_weights(
            counts, aggregation=settings.aggregation, max_length=settings.max_length, mask=mask
        ),
        score=scores if bound is None else scores.clamp(-bound, bound),
        sequence_kl=torch.zeros(len(counts)).index_add(0, sample, kl),
        first_return=found.returns[counts.cumsum(0) - counts],
    )


def _scores(data: Batch, settings: PPOSettings, module: str) -> tuple[Tensor, Tensor]:
    """Scores [B] and which samples are trained [B]."""
    rewards = torch.as_tensor(_column(data, "reward", module)).to(torch.float32)
    rewards = (rewards - settings.score_bias) * settings.score_scale
    if settings.truncation == "keep":
        return rewards, torch.ones(batch_size(data), dtype=torch.bool)
    return apply_truncation(
        rewards,
        _truncated(data, module),
        kind=settings.truncation,
        penalty=settings.truncation_penalty,
    )


def _end_values(data: Batch, module: str) -> Tensor:  # [B]
    """What the value model expects after the last token: of what was cut off, else nothing."""
    last = torch.as_tensor(_column(data, "last_value", module)).to(torch.float32)
    return torch.where(_truncated(data, module), last, 0.0)


def _truncated(data: Batch, module: str) -> Tensor:  # [B] bool
    reasons = _column(data, "finish_reason", module)
    return torch.tensor([reason == "length" for reason in reasons], dtype=torch.bool)


def _column(data: Batch, name: str, module: str) -> Any:
    if name not in data:
        raise DataError(
            f"module {module!r} needs the column {name!r}, and the batch has {sorted(data)}: call"
            f" {_MAKERS[name]} earlier in the flow, and return what it gives"
        )
    return data[name]


def _of_tokens(data: Batch, name: str, module: str) -> Tensor:  # [T] float32
    column = _column(data, name, module)
    for row, (value, response) in enumerate(zip(column, data["response_ids"], strict=True)):
        if len(value) != len(response):
            raise DataError(
                f"row {row} has {len(response)} response tokens but {len(value)} values in"
                f" {name!r}: {_MAKERS[name]} gives one for each token"
            )
    return flat(column).to(torch.float32)
