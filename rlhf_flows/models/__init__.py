"""Ready-made roles for Hugging Face causal language models, on the modules of the floor below.

Names are loaded when first used, so that a reward function costs no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_flows.models.function_reward import FunctionReward
    from rlhf_flows.models.policy_trainer import PolicyTrainer
    from rlhf_flows.models.reference import Reference
    from rlhf_flows.models.sft_trainer import SFTTrainer
    from rlhf_flows.models.torch_policy import TorchPolicy
    from rlhf_flows.models.vllm_policy import VLLMPolicy

__all__ = [
    "FunctionReward",
    "PolicyTrainer",
    "Reference",
    "SFTTrainer",
    "TorchPolicy",
    "VLLMPolicy",
]

_HOMES = {
    "FunctionReward": "function_reward",
    "PolicyTrainer": "policy_trainer",
    "Reference": "reference",
    "SFTTrainer": "sft_trainer",
    "TorchPolicy": "torch_policy",
    "VLLMPolicy": "vllm_policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
