"""Inherit Engine to implement a custom training Engine: ChatLearn's "Custom Flow".

    python -m examples.custom_engine -c examples/pairs.yaml
"""

from examples.megatron.models import PolicyReference
from examples.megatron.models import PolicyTrainer

import rlhf_flows
from rlhf_flows import Engine, Environment, Evaluator, Trainer
from rlhf_flows import BaseModule

rlhf_flows.init()
train_prompts = ["test", "best", "nest"] * 100
val_prompts = ["rest"] * 64

class CustomEngine(Engine):
    def __init__(self,
                 reference: BaseModule,
                 policy_trainer: BaseModule):
        def env_flow(batch):
            ref_out = reference.forward_step(batch)
            return ref_out

        def trainer_flow(batch):
            policy_trainer.train_step(batch)

        env = Environment(env_flow)
        trainer = Trainer(trainer_flow)
        super().__init__(env, trainer)

reference = PolicyReference("reference")
ppo_policy = PolicyTrainer("policy_trainer")
engine = CustomEngine(reference, ppo_policy) \
         .set_dataset(train_prompts)
engine.learn()

# If you need to add an evaluation module during the training process,
# you can also set the evaluator.
reference = PolicyReference("reference")
ppo_policy = PolicyTrainer("policy_trainer")

def eval_flow(batch):
    r0 = reference.eval_step(batch)
    return r0

evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
engine = CustomEngine(reference, ppo_policy) \
         .set_evaluator(evaluator) \
         .set_dataset(train_prompts)
engine.learn()
