"""From the settings of a reward to the module that gives it."""

from __future__ import annotations

from typing import Any

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.function_reward import FunctionReward
from rlhf_flows.models.interfaces import make_interface
from rlhf_flows.models.reward_model import RewardModel
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings

__all__ = ["build_reward"]


def build_reward(
    settings: RewardSettings, *, name: str = "reward", dtype: Any = "float32"
) -> BaseModule:
    """The module. Raises UserError where its source is not there."""
    if settings.model is not None:
        return RewardModel(name, path=settings.model, dtype=dtype)
    if settings.interface is not None:
        return make_interface(settings.interface, name, settings.args)
    if settings.function is not None:
        return FunctionReward(name, function=settings.function)
    raise ConfigError("this source of a reward is not built yet: give a function or a model")
