"""Ready-made roles for Hugging Face causal language models, on the modules of the floor below.

Names are loaded when first used, so that a reward function costs no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_flows.models.classifier_reward import ClassifierReward
    from rlhf_flows.models.command_reward import CommandReward
    from rlhf_flows.models.dpo_trainer import DPOTrainer
    from rlhf_flows.models.function_reward import FunctionReward
    from rlhf_flows.models.http_reward import HTTPReward
    from rlhf_flows.models.online_dpo_trainer import OnlineDPOTrainer
    from rlhf_flows.models.policy_trainer import PolicyTrainer
    from rlhf_flows.models.ppo_policy_trainer import PPOPolicyTrainer
    from rlhf_flows.models.preference_reference import PreferenceReference
    from rlhf_flows.models.reference import Reference
    from rlhf_flows.models.reward_model import RewardModel
    from rlhf_flows.models.reward_trainer import RewardTrainer
    from rlhf_flows.models.sft_trainer import SFTTrainer
    from rlhf_flows.models.torch_policy import TorchPolicy
    from rlhf_flows.models.value_model import ValueModel
    from rlhf_flows.models.value_trainer import ValueTrainer
    from rlhf_flows.models.vllm_policy import VLLMPolicy

__all__ = [
    "ClassifierReward",
    "CommandReward",
    "DPOTrainer",
    "FunctionReward",
    "HTTPReward",
    "OnlineDPOTrainer",
    "PPOPolicyTrainer",
    "PolicyTrainer",
    "PreferenceReference",
    "Reference",
    "RewardModel",
    "RewardTrainer",
    "SFTTrainer",
    "TorchPolicy",
    "VLLMPolicy",
    "ValueModel",
    "ValueTrainer",
]

_HOMES = {
    "ClassifierReward": "classifier_reward",
    "CommandReward": "command_reward",
    "DPOTrainer": "dpo_trainer",
    "FunctionReward": "function_reward",
    "HTTPReward": "http_reward",
    "OnlineDPOTrainer": "online_dpo_trainer",
    "PPOPolicyTrainer": "ppo_policy_trainer",
    "PolicyTrainer": "policy_trainer",
    "PreferenceReference": "preference_reference",
    "Reference": "reference",
    "RewardModel": "reward_model",
    "RewardTrainer": "reward_trainer",
    "SFTTrainer": "sft_trainer",
    "TorchPolicy": "torch_policy",
    "VLLMPolicy": "vllm_policy",
    "ValueModel": "value_model",
    "ValueTrainer": "value_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
