"""Pure functions on tensors, one algorithm or formula a file. Nothing here knows of models,
batches, Ray or Parquet; what a column is called is the affair of rlhf_flows.models.
"""

from rlhf_flows.algorithms.advantages import group_advantages
from rlhf_flows.algorithms.aggregation import token_weights
from rlhf_flows.algorithms.grpo import PolicyLoss, policy_loss
from rlhf_flows.algorithms.importance import importance_weights
from rlhf_flows.algorithms.kl import kl_estimate
from rlhf_flows.algorithms.sft import nll
from rlhf_flows.algorithms.truncation import apply_truncation

__all__ = [
    "PolicyLoss",
    "apply_truncation",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "nll",
    "policy_loss",
    "token_weights",
]
