"""The five phases as Prefect tasks, one file each, thin: find what is missing, dispatch it, return.

A task gets the `Runtime` of its attempt and a number (an episode or a policy version). Run again on
a finished phase it does nothing. Prefect's cache plays no part: the store is the truth.
"""

from rlhf_flows.tasks.evaluation import evaluation
from rlhf_flows.tasks.param_sync import param_sync
from rlhf_flows.tasks.progress import NoProgress, Progress
from rlhf_flows.tasks.rollout import rollout
from rlhf_flows.tasks.runtime import Runtime
from rlhf_flows.tasks.scoring import scoring
from rlhf_flows.tasks.training import training

__all__ = [
    "NoProgress",
    "Progress",
    "Runtime",
    "evaluation",
    "param_sync",
    "rollout",
    "scoring",
    "training",
]
