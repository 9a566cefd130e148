from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_flows.generation import GenerationSettings, cut_at_stop


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 0.001},
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"stop": ["a", ""]},
        {"stop_token_ids": [-1]},
        {"top_pp": 0.5},
    ],
)
def test_settings_that_cannot_be_sampled_with_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerationSettings.model_validate(wrong)


def test_one_stop_string_needs_no_list() -> None:
    assert GenerationSettings.model_validate({"stop": "END"}).stop == ("END",)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one", ("two",), "one"),
        ("one", (), "one"),
        ("two", ("two",), ""),
    ],
)
def test_a_text_is_cut_before_the_first_stop_string(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    assert cut_at_stop(text, stop) == expected
