"""The reward of a recipe: the module that its settings describe, and one question to it before
anything starts.
"""

from __future__ import annotations

from typing import Any, Protocol

from rlhf_flows.config import StoreConfig
from rlhf_flows.data.rows import load_rows
from rlhf_flows.dataset_settings import DatasetSettings
from rlhf_flows.deployments.model_folders import model_folder
from rlhf_flows.models.reward_sources import build_reward
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings

__all__ = ["ask_reward", "reward_module"]


class Rewarded(Protocol):
    """What is asked of a configuration."""

    @property
    def reward(self) -> RewardSettings | None: ...
    @property
    def prompts(self) -> DatasetSettings: ...
    @property
    def store(self) -> StoreConfig: ...
    @property
    def dtype(self) -> Any: ...


def reward_module(config: Rewarded) -> BaseModule:
    """The module, by the name of "reward". Raises UserError where its source is not there."""
    settings = config.reward
    assert settings is not None
    if settings.model is not None:
        folder = model_folder(settings.model, config.store)
        settings = settings.model_copy(update={"model": str(folder)})
    return build_reward(settings, name="reward", dtype=config.dtype)


def ask_reward(config: Rewarded) -> None:
    """Asks for the reward of an empty completion of the first prompt, where no model is needed.

    Raises UserError where it fails, or returns what is no reward; with the row and the cause.
    """
    settings = config.reward
    assert settings is not None
    if settings.model or settings.classifier or settings.interface:
        return  # their folders and arguments were checked; they score in a worker only
    row = load_rows(config.prompts.path)[0]
    sample = {name: [value] for name, value in row.items()}
    reward_module(config).forward_step(
        {**sample, "prompt": [str(row["prompt"])], "completion": [""], "seed": [0]}
    )
