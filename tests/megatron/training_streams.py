"""The trainers that ranks compare, and what they train on: batches of rows of very different
lengths, for each algorithm, the same for every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.models.value_trainer import ValueTrainer
from rlhf_flows.settings import GRPOSettings, OptimizerSettings, PPOSettings, RewardModelSettings

NUM_STEPS = 3
SETTINGS = OptimizerSettings(
    learning_rate=1e-3,
    weight_decay=0.1,
    # AdamW divides small gradients by their size: with its usual 1e-8 those that are nearly zero
    # move weights by what their rounding says.
    eps=1e-6,
    max_grad_norm=0.3,
    schedule="cosine",
    warmup_steps=1,
    total_steps=4,
)


def global_batch(step: int, trainer: SFTTrainer) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    lengths = [(3, 9), (1, 2), (20, 1), (7, 16), (2, 5), (11, 3), (4, 25)]
    batch: Batch = {
        "prompt_ids": [torch.randint(200, (p,), generator=g) for p, _ in lengths],
        "response_ids": [torch.randint(200, (r,), generator=g) for _, r in lengths],
    }
    batch["prompt_ids"][0][1] = 0  # the padding token, whose embedding learns from the head alone
    return trainer.prepare_batch(batch)


def group_batch(step: int, trainer: PolicyTrainer) -> Batch:
    """Three groups of siblings, with rewards and logprobs of a reference."""
    g = torch.Generator().manual_seed(200 + step)
    batch: Batch = {"prompt_ids": [], "response_ids": []}
    for prompt_length, responses in ((6, (3, 14, 8)), (2, (1, 9)), (15, (4, 4))):
        prompt = torch.randint(200, (prompt_length,), generator=g)
        batch["prompt_ids"] += [prompt] * len(responses)
        batch["response_ids"] += [torch.randint(200, (r,), generator=g) for r in responses]
    batch["group"] = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    batch["reward"] = torch.rand(7, generator=g)
    batch["reference_logprobs"] = [
        torch.rand(len(r), generator=g) - 6.0 for r in batch["response_ids"]
    ]
    return trainer.prepare_batch(batch)


def actor_batch(step: int, trainer: PPOPolicyTrainer | ValueTrainer) -> Batch:
    """Samples as PPO's trainers of policy and value both see them."""
    g = torch.Generator().manual_seed(400 + step)
    lengths = [(3, 9), (1, 2), (20, 1), (7, 16), (2, 5), (11, 3), (4, 25)]
    batch: Batch = {
        "prompt_ids": [torch.randint(200, (p,), generator=g) for p, _ in lengths],
        "response_ids": [torch.randint(200, (r,), generator=g) for _, r in lengths],
        "group": torch.arange(7),
        "reward": torch.randn(7, generator=g),
        "last_value": torch.randn(7, generator=g),
        "finish_reason": ["stop", "length", "stop", "stop", "length", "stop", "stop"],
    }
    columns = {"behaviour_logprobs": -6.0, "reference_logprobs": -6.0, "values": 0.0}
    for name, level in columns.items():
        batch[name] = [torch.rand(r, generator=g) + level for _, r in lengths]
    batch["normalized_values"] = [row * 2 - 1 for row in batch["values"]]
    return trainer.prepare_batch(batch)


def pair_batch(step: int, trainer: DPOTrainer | RewardTrainer) -> Batch:
    g = torch.Generator().manual_seed(300 + step)

    def texts(*lengths: int) -> list[torch.Tensor]:
        return [torch.randint(200, (length,), generator=g) for length in lengths]

    return trainer.prepare_batch(
        {
            "prompt_ids": texts(3, 9, 1, 12, 5, 2, 7),
            "chosen_ids": texts(4, 12, 6, 2, 9, 20, 3),
            "rejected_ids": texts(8, 3, 5, 11, 1, 2, 6),
            "margin": torch.rand(7, generator=g),
            "reference_chosen_logprob": -50 * torch.rand(7, generator=g),
            "reference_rejected_logprob": -50 * torch.rand(7, generator=g),
        }
    )


def made(algorithm: str, folder: str) -> tuple[Any, Callable[[int, Any], Batch]]:
    """A trainer on padded rows, and what makes its batches, of seven rows each."""
    common: dict[str, Any] = {"path": folder, "optimizer": SETTINGS, "layout": "padded"}
    ppo = {"kl_coef": 0.1, "bootstrap_truncated": True, "temperature": 0.9}
    if algorithm == "grpo":
        settings = GRPOSettings(kl_coef=0.1, exact_entropy=True, temperature=0.9)
        return PolicyTrainer("trainer", grpo=settings, **common), group_batch
    if algorithm == "ppo":
        return PPOPolicyTrainer("trainer", ppo=PPOSettings(**ppo), **common), actor_batch
    if algorithm == "value":
        return ValueTrainer("trainer", ppo=PPOSettings(**ppo), **common), actor_batch
    if algorithm == "value, normalized":
        normalized = PPOSettings(**ppo, value_norm="ma")
        return ValueTrainer("trainer", ppo=normalized, **common), actor_batch
    if algorithm == "reward":
        pairs = RewardModelSettings(use_margin=True, center_coef=0.01)
        return RewardTrainer("trainer", settings=pairs, **common), pair_batch
    if algorithm == "dpo":
        return DPOTrainer("trainer", **common), pair_batch
    return SFTTrainer("trainer", **common), global_batch
