"""The reward of a recipe: the module that its settings describe, and one question to it before
anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_flows.data.rows import load_rows
from rlhf_flows.deployments.fields import SamplingFields
from rlhf_flows.deployments.model_folders import model_folder
from rlhf_flows.models.reward_sources import build_reward, check_reward
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings

__all__ = ["ask_reward", "reward_module"]


def reward_module(config: SamplingFields) -> BaseModule:
    """The module, by the name of "reward". Raises UserError where its source is not there."""
    return build_reward(
        _settings(config), name="reward", policy_path=config.folder, dtype=config.dtype
    )


def ask_reward(config: SamplingFields) -> None:
    """Asks for the reward of an empty completion of the first prompt, as `check_reward` does.

    Raises UserError where it fails, or returns what is no reward; with the row and the cause.
    """
    policy = config.policy()
    rows: Sequence[Any] = load_rows(config.prompts.path, fields=policy.row_fields())[:1]
    if config.prompts.type is not None:  # the reward sees what that makes of a row
        rows = [policy.build_dataset(rows)[0]]
    check_reward(_settings(config), rows)


def _settings(config: SamplingFields) -> RewardSettings:
    settings: RewardSettings = config.reward  # type: ignore[attr-defined]  # of both subclasses
    if settings.model is None:
        return settings
    return settings.model_copy(update={"model": str(model_folder(settings.model, config.store))})
