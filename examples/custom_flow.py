"""Use Engine directly to construct a custom process: ChatLearn's "Custom Flow".

    python -m examples.custom_flow -c examples/rlhf.yaml
"""

from examples.megatron.models import PolicyInference
from examples.megatron.models import PolicyReference
from examples.megatron.models import PolicyTrainer
from examples.megatron.models import RewardInference
from examples.megatron.models import ValueInference
from examples.megatron.models import ValueTrainer

import rlhf_flows
from rlhf_flows import Engine, Environment, Evaluator, Trainer

rlhf_flows.init()
train_prompts = ["test"] * 4096
val_prompts = ["best"] * 64

policy = PolicyInference("policy")
value = ValueInference("value")
reference = PolicyReference("reference")
reward = RewardInference("reward")
ppo_policy = PolicyTrainer("ppo_policy")
ppo_value = ValueTrainer("ppo_value")

def env_flow(batch):
    policy_out = policy.forward_step(batch)
    ref_out = reference.forward_step(policy_out)
    value_out = value.forward_step(policy_out)
    reward_out = reward.forward_step(policy_out, ref_out, value_out)
    return reward_out

def trainer_flow(batch):
    ppo_policy.train_step(batch)
    ppo_value.train_step(batch)

def eval_flow(batch):
    r0 = policy.eval_step(batch)
    r1 = reward.eval_step(r0)
    return r1

env = Environment(env_flow)
trainer = Trainer(trainer_flow)
evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
engine = Engine(env, trainer, evaluator) \
             .set_parameter_sync(ppo_policy, policy) \
             .set_parameter_sync(ppo_value, value) \
             .set_dataset(train_prompts)
engine.learn()
