"""The models of the examples: the listings of ChatLearn's documents, completed where they `pass`.

They are small: a table of 16 x 16 logits says which letter follows which. The reward likes words
that go up the alphabet.
"""

from examples.megatron.models.policy_inference import PolicyInference
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.reward_inference import RewardInference
from examples.megatron.models.value_inference import ValueInference
from examples.megatron.models.value_trainer import ValueTrainer

__all__ = [
    "PolicyInference",
    "PolicyReference",
    "PolicyTrainer",
    "RewardInference",
    "ValueInference",
    "ValueTrainer",
]
