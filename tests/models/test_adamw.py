from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf_flows.models import adamw
from rlhf_flows.models.adamw import learning_rate_at, make_adamw, make_masters, step_masters
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


def test_masters_that_are_stepped_some_at_a_time_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for elements in (2**28, 40, 1):
        monkeypatch.setattr(adamw, "_SLICE_ELEMENTS", elements)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(4))).bfloat16()
        masters = make_masters(model)
        optimizer = make_adamw(model, OptimizerSettings(learning_rate=0.1), masters)
        for _ in range(3):
            model(torch.ones(2, 5, dtype=torch.bfloat16)).square().sum().backward()
            step_masters(model, optimizer, masters)
            assert all(p.grad is None for p in [*model.parameters(), *masters.values()])
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        found.append({**masters, **dict(model.named_parameters(prefix="rounded"))})
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


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
