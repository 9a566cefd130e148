"""Pure functions on tensors, one algorithm or formula a file. Nothing here knows of models,
batches, Ray or Parquet; what a column is called is the affair of rlhf_flows.models.
"""

from rlhf_flows.algorithms.adaptive_kl import adapted_kl_coef
from rlhf_flows.algorithms.advantages import group_advantages
from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.dpo import PairLoss, dpo_loss
from rlhf_flows.algorithms.gae import Advantages, generalized_advantages, whiten
from rlhf_flows.algorithms.grpo import PolicyLoss, policy_loss
from rlhf_flows.algorithms.importance import importance_weights
from rlhf_flows.algorithms.kl import kl_estimate
from rlhf_flows.algorithms.preference import preference_loss
from rlhf_flows.algorithms.sft import nll
from rlhf_flows.algorithms.token_rewards import token_rewards
from rlhf_flows.algorithms.truncation import apply_truncation
from rlhf_flows.algorithms.value import ValueLoss, value_loss
from rlhf_flows.algorithms.value_norm import RunningMoments, denormalized

__all__ = [
    "Advantages",
    "PairLoss",
    "PolicyLoss",
    "RunningMoments",
    "ValueLoss",
    "adapted_kl_coef",
    "apply_truncation",
    "denormalized",
    "dpo_loss",
    "generalized_advantages",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "nll",
    "policy_loss",
    "preference_loss",
    "token_rewards",
    "token_weights",
    "value_loss",
    "whiten",
]
