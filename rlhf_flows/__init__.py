"""RLHF and RL post-training of language models as Prefect flows on persistent Ray actor pools.

The names below are loaded when first used, so that `import rlhf_flows` costs nothing: no torch,
Ray, vLLM, Megatron or Prefect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_flows.data import (
        EpisodeRelayBuffer,
        RelaySampleManager,
        StreamDataset,
        register_dataset,
    )
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
    from rlhf_flows.modules import (
        BaseModule,
        DeepSpeedModule,
        MegatronModule,
        TorchModule,
        VLLMModule,
    )

__version__ = "0.1.0"

__all__ = [
    "BaseModule",
    "ControlDependencies",
    "DPOEngine",
    "DeepSpeedModule",
    "Engine",
    "Environment",
    "EpisodeRelayBuffer",
    "EvalEngine",
    "Evaluator",
    "GRPOEngine",
    "MegatronModule",
    "OnlineDPOEngine",
    "RLHFEngine",
    "RelaySampleManager",
    "RewardModelEngine",
    "SFTEngine",
    "StreamDataset",
    "TorchModule",
    "Trainer",
    "VLLMModule",
    "__version__",
    "init",
    "register_dataset",
]

_HOMES = {
    "BaseModule": "rlhf_flows.modules",
    "ControlDependencies": "rlhf_flows.graph",
    "DPOEngine": "rlhf_flows.engines",
    "DeepSpeedModule": "rlhf_flows.modules",
    "Engine": "rlhf_flows.engine",
    "Environment": "rlhf_flows.engine",
    "EpisodeRelayBuffer": "rlhf_flows.data",
    "EvalEngine": "rlhf_flows.engines",
    "Evaluator": "rlhf_flows.engine",
    "GRPOEngine": "rlhf_flows.engines",
    "MegatronModule": "rlhf_flows.modules",
    "OnlineDPOEngine": "rlhf_flows.engines",
    "RLHFEngine": "rlhf_flows.engines",
    "RelaySampleManager": "rlhf_flows.data",
    "RewardModelEngine": "rlhf_flows.engines",
    "SFTEngine": "rlhf_flows.engines",
    "StreamDataset": "rlhf_flows.data",
    "TorchModule": "rlhf_flows.modules",
    "Trainer": "rlhf_flows.engine",
    "VLLMModule": "rlhf_flows.modules",
    "init": "rlhf_flows.initialization",
    "register_dataset": "rlhf_flows.data.dataset_kinds",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
