from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_flows.models.adamw import learning_rate_at, make_adamw
from rlhf_flows.settings import GRPOSettings, OptimizerSettings


def rates(steps: range, **options: Any) -> list[float]:
    settings = OptimizerSettings(learning_rate=1.0, **options)
    return [learning_rate_at(step, settings) for step in steps]


def test_schedules_by_hand() -> None:
    assert rates(range(3)) == [1.0, 1.0, 1.0]
    assert rates(range(5), warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates(range(7), schedule="linear", total_steps=5, warmup_steps=1)
    assert linear == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    cosine = rates(range(5), schedule="cosine", total_steps=4, min_learning_rate=0.2)
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert cosine == pytest.approx(expected)


def test_one_step_is_adamw_by_hand() -> None:
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_adamw(model, settings)
    model.weight.grad, model.bias.grad = torch.tensor([[4.0]]), torch.tensor([-5.0])
    optimizer.step()
    # The first step of Adam is the sign of the gradient; only matrices decay.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)
    assert model.bias.item() == pytest.approx(3.0 + 0.1)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (OptimizerSettings, {"schedule": "cosine"}, "needs total_steps"),
        (OptimizerSettings, {"warmup_steps": 5, "total_steps": 5}, "leaves nothing"),
        (OptimizerSettings, {"learning_rate": 1e-6, "min_learning_rate": 1e-5}, "is above"),
        (OptimizerSettings, {"learning_rate": float("nan")}, "learning_rate"),
        (OptimizerSettings, {"lr": 1.0}, "lr"),
        (GRPOSettings, {"aggregation": "fixed"}, "needs max_length"),
        (GRPOSettings, {"importance": "token", "old_logprobs": "behaviour"}, "makes them the same"),
        (GRPOSettings, {"clip_low": 1.0}, "clip_low"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    settings: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**options)
