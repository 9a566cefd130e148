from __future__ import annotations

import pytest

from rlhf_flows.deployments import sort_digits


def test_no_held_out_prompt_is_trained_or_demonstrated() -> None:
    held_out = {row["prompt"] for row in sort_digits.held_out_prompts(sort_digits.HELD_OUT)}
    assert len(held_out) == sort_digits.HELD_OUT
    trained = {row["prompt"] for row in sort_digits.training_prompts(50_000)}
    shown = {row["prompt"] for row in sort_digits.demonstrations(50_000)}
    assert not held_out & (trained | shown)


def test_rows_follow_from_their_seed() -> None:
    for rows in (sort_digits.training_prompts, sort_digits.demonstrations):
        assert rows(20, seed=1) == rows(20, seed=1)
        assert rows(20, seed=1) != rows(20, seed=2)
    assert sort_digits.held_out_prompts(20) == sort_digits.held_out_prompts(30)[:20]


def test_every_prompt_is_answered_by_its_digits_in_order() -> None:
    for row in sort_digits.training_prompts(1000):
        assert row["answer"] == "".join(sorted(row["prompt"].removesuffix(">")))


def test_demonstrations_are_wrong_more_often_than_right() -> None:
    rows = sort_digits.demonstrations(20_000)
    # Of ordered digits, the three ideas may agree by chance; that is rare among five.
    kinds = {"sorted": 0, "reversed": 0, "copied": 0}
    for row in rows:
        digits = row["prompt"].removesuffix(">")
        answer = "".join(sorted(digits))
        kind = {digits: "copied", answer[::-1]: "reversed", answer: "sorted"}
        kinds[kind[row["completion"]]] += 1
    shares = {kind: count / len(rows) for kind, count in kinds.items()}
    assert shares == pytest.approx({"sorted": 0.4, "reversed": 0.3, "copied": 0.3}, abs=0.02)


@pytest.mark.parametrize(
    ("completion", "reward", "exact"),
    [
        ("01237", 1.0, 1.0),
        ("01273", 0.3, 0.0),
        ("0123", 0.4, 0.0),
        ("012377", 0.5, 0.0),
        ("", 0.0, 0.0),
        ("73210", 0.1, 0.0),
    ],
)
def test_half_is_for_each_digit_and_half_for_all(
    completion: str, reward: float, exact: float
) -> None:
    found = sort_digits.reward("70213>", completion, "01237")
    assert found == pytest.approx({"reward": reward, "exact": exact})


def test_more_prompts_than_are_held_out_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="2048"):
        sort_digits.held_out_prompts(5000)
