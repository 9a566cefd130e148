"""The main file of ChatLearn's "DPO": a frozen reference and a trainer.

    python -m examples.dpo -c examples/pairs.yaml
"""

from examples.megatron.models import PolicyReference
from examples.megatron.models import PolicyTrainer

import rlhf_flows
from rlhf_flows import DPOEngine

# init
rlhf_flows.init()

# define models
reference_model = PolicyReference("reference")
ppo_policy_model = PolicyTrainer("ppo_policy")

# define engine
engine = DPOEngine(reference_model,
                   ppo_policy_model)

# set dataset
train_prompts = ["test"] * 4096
engine.set_dataset(train_prompts)

# start dpo training
engine.learn()
