"""From what a configuration says of a reward to the module that gives it, tried once.

The decision here: every source is a module like any other, and what one of them can do follows from
`RewardSettings` alone, so that each recipe asks here and knows none of them. Interfaces of one's
own are found by the name they were registered under, or as `package.module:Class`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_flows.errors import ConfigError, RewardError, WaitTimeoutError
from rlhf_flows.models.causal_lm import DType, load_tokenizer
from rlhf_flows.models.interfaces import make_interface
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.reward_settings import RewardSettings

__all__ = ["build_reward", "check_reward"]

_TIMEOUT_S = 60.0
"""Of the one call of a function that has no limit in the run itself."""

logger = logging.getLogger(__name__)


def build_reward(
    settings: RewardSettings,
    *,
    name: str = "reward",
    policy_path: str | Path | None = None,
    dtype: DType = "float32",
) -> BaseModule:
    """The module of that name which gives the rewards; nothing is loaded, asked or started.

    Args:
        policy_path: the policy's folder. A reward model reads the policy's tokens, so the two must
            have one vocabulary.
        dtype: of a reward model's weights; a classifier has float32.

    Raises:
        ConfigError: an unknown interface, one that cannot be made of its arguments, or a reward
            model of another vocabulary.
    """
    if settings.model is not None:
        return _reward_model(settings.model, name, policy_path, dtype)
    if settings.interface is not None:
        return make_interface(settings.interface, name, settings.args)
    failures: dict[str, Any] = {
        "on_failure": settings.on_failure,
        "failure_reward": settings.failure_reward,
    }
    if settings.classifier is not None:
        from rlhf_flows.models.classifier_reward import ClassifierReward

        return ClassifierReward(
            name,
            path=settings.classifier,
            label=settings.label,
            scored_text=settings.scored_text,
            **failures,
        )
    if settings.timeout_s is not None:
        failures["timeout_s"] = settings.timeout_s
    if settings.max_concurrency is not None:
        failures["max_concurrency"] = settings.max_concurrency
    if settings.command is not None:
        from rlhf_flows.models.command_reward import CommandReward

        return CommandReward(
            name,
            command=settings.command,
            memory_mb=settings.memory_mb,
            environment=settings.environment,
            **failures,
        )
    if settings.url is not None:
        from rlhf_flows.models.http_reward import HTTPReward

        return HTTPReward(
            name,
            url=settings.url,
            token_env=settings.token_env,
            request_size=settings.request_size,
            retries=settings.retries,
            **failures,
        )
    from rlhf_flows.models.function_reward import FunctionReward

    assert settings.function is not None
    return FunctionReward(name, function=settings.function, **failures)


def _reward_model(path: str, name: str, policy_path: str | Path | None, dtype: DType) -> BaseModule:
    from rlhf_flows.models.reward_model import RewardModel

    module = RewardModel(name, path=path, dtype=dtype)
    if policy_path is not None:
        module.validate()
        if load_tokenizer(path).get_vocab() != load_tokenizer(policy_path).get_vocab():
            raise ConfigError(
                f"the reward model in {path!r} has another vocabulary than the policy in"
                f" {str(policy_path)!r}, whose tokens it reads: train it from the same model, or"
                " give it as reward.classifier, which tokenizes the texts again"
            )
    return module


def check_reward(settings: RewardSettings, rows: Sequence[Mapping[str, Any]]) -> None:
    """Asks the reward for an empty completion of the first row, before anything starts.

    A service must answer, a program must start, a function must not raise. With on_failure="score"
    a program or function may fail for this sample, which is logged. A reward model and an interface
    are not asked, as they may not fit this machine: `validate` alone looks at them.

    Raises:
        UserError: it cannot be asked, or gives what is no reward; with the row and the cause.
    """
    asked: dict[str, Any] = (
        {"timeout_s": settings.timeout_s or _TIMEOUT_S} if settings.function else {}
    )
    if settings.url is not None:  # that it is away is no property of a sample
        asked["on_failure"] = "stop"
    reward = build_reward(settings.model_copy(update=asked))
    reward.validate()
    if settings.source in ("model", "interface"):
        return
    reward.setup()
    row = rows[0]
    sample = {name: [value] for name, value in row.items()}
    try:
        scored = reward.forward_step(
            {**sample, "prompt": [str(row.get("prompt", ""))], "completion": [""], "seed": [0]}
        )
    except WaitTimeoutError as e:  # during a run it would be tried again
        raise RewardError(str(e)) from e
    if cause := scored.get("reward_failure", [None])[0]:
        logger.warning(
            "the reward of an empty completion failed (%s): such samples get failure_reward=%g",
            cause,
            settings.failure_reward,
        )
