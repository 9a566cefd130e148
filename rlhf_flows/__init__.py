"""RLHF and RL post-training of language models as Prefect flows on persistent Ray actor pools.

The names below are loaded when first used, so that `import rlhf_flows` costs nothing: no torch,
Ray, vLLM, Megatron or Prefect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_flows.data import EpisodeRelayBuffer, RelaySampleManager, StreamDataset
    from rlhf_flows.engine import Engine, Environment, Evaluator, GRPOEngine, SFTEngine, Trainer
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
    "DeepSpeedModule",
    "Engine",
    "Environment",
    "EpisodeRelayBuffer",
    "Evaluator",
    "GRPOEngine",
    "MegatronModule",
    "RelaySampleManager",
    "SFTEngine",
    "StreamDataset",
    "TorchModule",
    "Trainer",
    "VLLMModule",
    "__version__",
    "init",
]

_HOMES = {
    "BaseModule": "rlhf_flows.modules",
    "ControlDependencies": "rlhf_flows.graph",
    "DeepSpeedModule": "rlhf_flows.modules",
    "MegatronModule": "rlhf_flows.modules",
    "init": "rlhf_flows.initialization",
    "Engine": "rlhf_flows.engine",
    "Environment": "rlhf_flows.engine",
    "Evaluator": "rlhf_flows.engine",
    "GRPOEngine": "rlhf_flows.engine",
    "SFTEngine": "rlhf_flows.engine",
    "EpisodeRelayBuffer": "rlhf_flows.data",
    "RelaySampleManager": "rlhf_flows.data",
    "StreamDataset": "rlhf_flows.data",
    "TorchModule": "rlhf_flows.modules",
    "Trainer": "rlhf_flows.engine",
    "VLLMModule": "rlhf_flows.modules",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
