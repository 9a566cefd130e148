"""Interfaces by name: the ready-made modules, and those that a program registers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.registry import Registry, nearest

__all__ = ["make_interface", "register_interface"]

ModuleT = TypeVar("ModuleT", bound=BaseModule)

_OWN = {
    "vllm_policy": "vllm_policy:VLLMPolicy",
    "torch_policy": "torch_policy:TorchPolicy",
    "reference": "reference:Reference",
    "reward_model": "reward_model:RewardModel",
    "value_model": "value_model:ValueModel",
    "function_reward": "function_reward:FunctionReward",
    "preference_reference": "preference_reference:PreferenceReference",
    "sft": "sft_trainer:SFTTrainer",
    "paired_reward": "reward_trainer:RewardTrainer",
    "ppo_policy": "ppo_policy_trainer:PPOPolicyTrainer",
    "ppo_value": "value_trainer:ValueTrainer",
    "grpo_policy": "policy_trainer:PolicyTrainer",
    "dpo": "dpo_trainer:DPOTrainer",
    "online_dpo": "online_dpo_trainer:OnlineDPOTrainer",
}

_INTERFACES: Registry[type[BaseModule]] = Registry(
    "interface", {name: f"rlhf_flows.models.{where}" for name, where in _OWN.items()}
)


def register_interface(name: str, interface: type[ModuleT]) -> type[ModuleT]:
    """Makes a module's class known by a name, for configurations and calls.

    The name is looked up where a run is started: workers are sent the class itself.
    Raises ConfigError where it is no class of a module.
    """
    if not (isinstance(interface, type) and issubclass(interface, BaseModule)):
        raise ConfigError(
            f"interface {name!r} is {interface!r:.60}, expected a class derived from ModelInterface"
            " or another module"
        )
    _INTERFACES.register(name, interface)
    return interface


def make_interface(
    interface: str | type[BaseModule], name: str, args: Mapping[str, Any] | None = None
) -> BaseModule:
    """A module of that interface, made as `interface(name, **args)`.

    Raises ConfigError: no such interface, or it does not take these arguments.
    """
    kind = _INTERFACES.find(interface) if isinstance(interface, str) else interface
    label = interface if isinstance(interface, str) else interface.__name__
    if not (isinstance(kind, type) and issubclass(kind, BaseModule)):
        raise ConfigError(
            f"interface {label!r} is a {type(kind).__name__}, expected a class derived from"
            " ModelInterface or another module"
        )
    args = dict(args or {})
    parameters = inspect.signature(kind.__init__).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in args:
        if argument not in parameters and not takes_any:
            known = [n for n in parameters if n not in ("self", "name")]
            raise ConfigError(
                f"interface {label!r} takes no {argument!r}{nearest(argument, known)}: its"
                f" arguments are {', '.join(known) or 'none'}"
            )
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and n not in ("self", "name")
    ]
    if missing := [n for n in required if n not in args]:
        raise ConfigError(
            f"interface {label!r} needs {', '.join(map(repr, missing))}: give it among the"
            " arguments of the call"
        )
    return kind(name, **args)
