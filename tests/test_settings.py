"""Settings contradict themselves when they are made, not in the middle of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_flows.settings import (
    DPOSettings,
    GRPOSettings,
    PPOSettings,
    RewardModelSettings,
    Settings,
)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GRPOSettings, {"aggregation": "fixed"}, "needs max_length"),
        (PPOSettings, {"aggregation": "fixed"}, "needs max_length"),
        (PPOSettings, {"importance": "token", "old_logprobs": "behaviour"}, "makes them the same"),
        (PPOSettings, {"gamma": 1.1}, "less than or equal to 1"),
        (PPOSettings, {"lambda_": -0.1}, "greater than or equal to 0"),
        (PPOSettings, {"value_clip": 0.0}, "greater than 0"),
        (PPOSettings, {"kl_coef": float("nan")}, "finite number"),
        (PPOSettings, {"kl_coeff": 0.1}, "Extra inputs"),
        (PPOSettings, {"adaptive_kl": True, "kl_coef": 0.0}, "0 stays 0"),
        (PPOSettings, {"value_norm": "popart"}, "'none', 'exp' or 'ma'"),
        (GRPOSettings, {"early_stop_ratio": 1.0}, "greater than 1"),
        (DPOSettings, {"kind": "ipo", "label_smoothing": 0.1}, "belongs to kind='dpo'"),
        (DPOSettings, {"label_smoothing": 0.5}, "less than 0.5"),
        (DPOSettings, {"beta": 0}, "greater than 0"),
        (RewardModelSettings, {"center_coef": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    kind: type[Settings], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**fields)


@pytest.mark.parametrize("kind", [GRPOSettings, PPOSettings, DPOSettings, RewardModelSettings])
def test_every_field_says_what_it_is(kind: type[Settings]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []
    with pytest.raises(ValidationError, match="frozen"):
        setattr(kind(), next(iter(kind.model_fields)), None)


@pytest.mark.parametrize(("kind", "name"), [(GRPOSettings, "GRPO"), (PPOSettings, "PPO")])
def test_the_page_on_algorithms_has_every_field_with_its_default(
    kind: type[Settings], name: str
) -> None:
    page = (Path(__file__).parents[1] / "docs/algorithms.md").read_text()
    told: dict[str, str] = {}
    for row in re.findall(rf"^\| (`.*?) \| (?:both|{name}) \| (.*?) \|", page, re.MULTILINE):
        fields, defaults = (cell.split(", ") for cell in row)
        told |= dict(zip((f.strip("`") for f in fields), defaults, strict=True))
    written = {"None": "null", "True": "true", "False": "false"}
    said = {
        field: written.get(str(info.default), str(info.default))
        for field, info in kind.model_fields.items()
    }
    assert told == said
