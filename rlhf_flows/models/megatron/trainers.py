"""The ready-made trainers on Megatron: each is its trainer with other bases around it (role.py)."""

from __future__ import annotations

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.megatron.role import MegatronRole, MegatronScalarRole, OnMegatron
from rlhf_flows.models.megatron.scalar import with_ends
from rlhf_flows.models.online_dpo_trainer import OnlineDPOTrainer
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.models.value_trainer import ValueTrainer

__all__ = [
    "MegatronDPOTrainer",
    "MegatronOnlineDPOTrainer",
    "MegatronPPOPolicyTrainer",
    "MegatronPolicyTrainer",
    "MegatronRewardTrainer",
    "MegatronSFTTrainer",
    "MegatronValueTrainer",
]


class MegatronSFTTrainer(OnMegatron, SFTTrainer, MegatronRole):
    """`SFTTrainer` on Megatron."""


class MegatronPolicyTrainer(OnMegatron, PolicyTrainer, MegatronRole):
    """`PolicyTrainer` (GRPO) on Megatron."""


class MegatronPPOPolicyTrainer(OnMegatron, PPOPolicyTrainer, MegatronRole):
    """`PPOPolicyTrainer` on Megatron."""


class MegatronValueTrainer(OnMegatron, ValueTrainer, MegatronScalarRole):
    """`ValueTrainer` on Megatron."""


class MegatronRewardTrainer(OnMegatron, RewardTrainer, MegatronScalarRole):
    """`RewardTrainer` on Megatron."""

    def samples_of(self, data: Batch) -> Batch:
        # The score at a text's last token is asked for, which a pass otherwise leaves out.
        return with_ends(super().samples_of(data))


class MegatronDPOTrainer(OnMegatron, DPOTrainer, MegatronRole):
    """`DPOTrainer` on Megatron."""


class MegatronOnlineDPOTrainer(OnMegatron, OnlineDPOTrainer, MegatronRole):
    """`OnlineDPOTrainer` on Megatron."""
