"""What a user subclasses: one model, by the library it runs in. Knows no Ray, Prefect or Parquet.

Names are loaded when first used, so that a torch module costs no vLLM and a flow no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_flows.modules.base import BaseModule, ModuleContext
    from rlhf_flows.modules.deepspeed_module import DeepSpeedModule
    from rlhf_flows.modules.megatron.module import MegatronModule
    from rlhf_flows.modules.torch_module import TorchModule
    from rlhf_flows.modules.vllm_module import VLLMModule

__all__ = [
    "BaseModule",
    "DeepSpeedModule",
    "MegatronModule",
    "ModuleContext",
    "TorchModule",
    "VLLMModule",
]

_HOMES = {
    "BaseModule": "base",
    "DeepSpeedModule": "deepspeed_module",
    "MegatronModule": "megatron.module",
    "ModuleContext": "base",
    "TorchModule": "torch_module",
    "VLLMModule": "vllm_module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
