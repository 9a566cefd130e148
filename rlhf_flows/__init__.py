"""RLHF and RL post-training of language models as Prefect flows on persistent Ray actor pools.

The names below are loaded when first used, so that `import rlhf_flows` costs nothing: no torch,
Ray, vLLM, Megatron or Prefect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_flows.calls import Call, GraphEngine
    from rlhf_flows.data import (
        EpisodeRelayBuffer,
        RelaySampleManager,
        StreamDataset,
        register_dataset,
    )
    from rlhf_flows.deployments import EngineRecipe, find_recipe, register_recipe
    from rlhf_flows.engine import Engine, Environment, Evaluator, Trainer
    from rlhf_flows.engines import (
        DPOEngine,
        EvalEngine,
        GRPOEngine,
        OnlineDPOEngine,
        RewardModelEngine,
        RLHFEngine,
        SFTEngine,
    )
    from rlhf_flows.graph import ControlDependencies
    from rlhf_flows.initialization import init
    from rlhf_flows.models.families import Family, register_family
    from rlhf_flows.models.family_check import check_family
    from rlhf_flows.models.interfaces import register_interface
    from rlhf_flows.modules import (
        BaseModule,
        DeepSpeedModule,
        MegatronModule,
        TorchModule,
        VLLMModule,
    )
    from rlhf_flows.modules.interface import ModelInterface
    from rlhf_flows.records.opened_run import OpenedRun, open_run

__version__ = "0.1.0"

__all__ = [
    "BaseModule",
    "Call",
    "ControlDependencies",
    "DPOEngine",
    "DeepSpeedModule",
    "Engine",
    "EngineRecipe",
    "Environment",
    "EpisodeRelayBuffer",
    "EvalEngine",
    "Evaluator",
    "Family",
    "GRPOEngine",
    "GraphEngine",
    "MegatronModule",
    "ModelInterface",
    "OnlineDPOEngine",
    "OpenedRun",
    "RLHFEngine",
    "RelaySampleManager",
    "RewardModelEngine",
    "SFTEngine",
    "StreamDataset",
    "TorchModule",
    "Trainer",
    "VLLMModule",
    "__version__",
    "check_family",
    "find_recipe",
    "init",
    "open_run",
    "register_dataset",
    "register_family",
    "register_interface",
    "register_recipe",
]

_HOMES = {
    "BaseModule": "rlhf_flows.modules",
    "Call": "rlhf_flows.calls",
    "ControlDependencies": "rlhf_flows.graph",
    "DPOEngine": "rlhf_flows.engines",
    "DeepSpeedModule": "rlhf_flows.modules",
    "Engine": "rlhf_flows.engine",
    "EngineRecipe": "rlhf_flows.deployments",
    "Environment": "rlhf_flows.engine",
    "EpisodeRelayBuffer": "rlhf_flows.data",
    "EvalEngine": "rlhf_flows.engines",
    "Evaluator": "rlhf_flows.engine",
    "Family": "rlhf_flows.models.families",
    "GRPOEngine": "rlhf_flows.engines",
    "GraphEngine": "rlhf_flows.calls",
    "MegatronModule": "rlhf_flows.modules",
    "ModelInterface": "rlhf_flows.modules.interface",
    "OnlineDPOEngine": "rlhf_flows.engines",
    "OpenedRun": "rlhf_flows.records.opened_run",
    "RLHFEngine": "rlhf_flows.engines",
    "RelaySampleManager": "rlhf_flows.data",
    "RewardModelEngine": "rlhf_flows.engines",
    "SFTEngine": "rlhf_flows.engines",
    "StreamDataset": "rlhf_flows.data",
    "TorchModule": "rlhf_flows.modules",
    "Trainer": "rlhf_flows.engine",
    "VLLMModule": "rlhf_flows.modules",
    "check_family": "rlhf_flows.models.family_check",
    "find_recipe": "rlhf_flows.deployments",
    "init": "rlhf_flows.initialization",
    "open_run": "rlhf_flows.records.opened_run",
    "register_dataset": "rlhf_flows.data.dataset_kinds",
    "register_family": "rlhf_flows.models.families",
    "register_interface": "rlhf_flows.models.interfaces",
    "register_recipe": "rlhf_flows.deployments",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
