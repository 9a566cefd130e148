"""What a run looks like: percentage, table, curves, samples; and the picture of the curves."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.reporting.curves import draw
from rlhf_flows.reporting.run_board import Curve, RunBoard

PHASES = {
    "rollout": range(3),
    "scoring": range(3),
    "training": range(3),
    "param_sync": range(1, 4),
    "evaluation": [0, 3],
}
SVG = "{http://www.w3.org/2000/svg}"


def a_board(**settings: Any) -> RunBoard:
    return RunBoard(settings=RuntimeConfig(num_episode=3, **settings), phases=PHASES)


def run_episode(board: RunBoard, episode: int, *, reward: float) -> None:
    scores = {"reward": reward, "age": 41.0, "exact": reward / 2}
    for phase, number, metrics in (
        ("rollout", episode, {}),
        ("scoring", episode, scores),
        ("training", episode, {**scores, "loss": -0.5, "rows": 64.0, "advantage": 0.0}),
        ("param_sync", episode + 1, {"probe_gap": 0.0}),
    ):
        board.started(phase, number, 4)
        board.advanced(phase, number, 4)
        board.finished(phase, number, 1.23456, metrics)


def test_a_run_is_at_zero_before_and_at_a_hundred_after_all_its_phases() -> None:
    board = a_board()
    assert board.percent == 0
    board.finished("evaluation", 0, 0.1, {"reward": 0.1})
    for episode in range(3):
        run_episode(board, episode, reward=0.5)
    assert 90 < board.percent < 100
    board.finished("evaluation", 3, 0.1, {"reward": 0.5})
    assert board.percent == pytest.approx(100)


def test_shards_move_the_percentage_within_a_phase() -> None:
    board = a_board()
    board.started("rollout", 0, 4)
    board.advanced("rollout", 0, 1)
    assert board.percent == pytest.approx(100 / 14 / 4)


def test_the_initial_sync_is_no_part_of_the_percentage() -> None:
    board = a_board()
    board.finished("param_sync", 0, 0.1, {})
    assert board.percent == 0


def test_a_row_has_reward_and_its_parts_first_and_no_bookkeeping() -> None:
    board = a_board()
    board.finished("evaluation", 0, 0.1, {"reward": 0.1, "exact": 0.2})
    run_episode(board, 0, reward=0.123456)
    board.finished("training", 0, 2.0, {"kl": 1.23456e-5})
    (row,) = board.episodes()
    assert list(row)[:4] == ["episode", "reward", "exact", "age"]
    assert row["reward"] == 0.1235
    assert row["kl"] == 1.23e-5
    assert row["rollout s"] == 1.23
    assert row["training s"] == 2.0
    assert row["param sync s"] == 1.23
    assert not {"rows", "advantage"} & set(row)


def test_the_newest_episode_comes_first() -> None:
    board = a_board()
    for episode in range(3):
        run_episode(board, episode, reward=0.5)
    assert [row["episode"] for row in board.episodes()] == [2, 1, 0]


def test_the_table_of_a_resumed_run_starts_with_what_is_stored() -> None:
    whole, resumed = a_board(), a_board()
    for board in (whole, resumed):
        if board is whole:
            run_episode(board, 0, reward=0.3)
        else:
            metrics = {"reward": 0.3, "age": 41.0, "exact": 0.15, "loss": -0.5, "rows": 64.0}
            board.resume({0: {"metrics": metrics, "seconds": 1.23456}}, first=1)
        assert board.percent == pytest.approx(100 * 4 / 14)
    (row,), (stored,) = whole.episodes(), resumed.episodes()
    assert stored.items() <= row.items()


def test_what_is_not_finite_is_empty_in_the_table() -> None:
    board = a_board()
    board.finished("training", 0, 1.0, {"loss": math.nan, "reward": math.inf})
    assert json.loads(json.dumps(board.episodes(), allow_nan=False))[0]["loss"] is None


def test_curves_are_the_reward_and_its_first_part_by_version() -> None:
    board = a_board(max_staleness=1)
    board.finished("evaluation", 0, 0.1, {"reward": 0.1, "age": 41.0, "exact": 0.2})
    for episode in range(3):
        run_episode(board, episode, reward=0.1 * episode)
    reward, exact = board.curves()
    assert (reward.name, exact.name) == ("reward", "exact")
    assert reward.held_out == ((0, 0.1),)
    # With a staleness of 1 episode 2 was sampled by version 1.
    assert [version for version, _ in reward.train] == [0, 0, 1]


def test_without_rewards_the_curve_is_the_loss() -> None:
    board = a_board()
    board.finished("training", 0, 1.0, {"loss": 2.0})
    assert [c.name for c in board.curves()] == ["loss"]


def test_samples_of_different_prompts_come_before_siblings() -> None:
    board = a_board()
    previews = [{"prompt": p, "completion": c} for p, c in ("aA", "aB", "aC", "bD")]
    board.samples(0, previews)
    assert [row["completion"] for row in board.sample_rows()] == ["A", "D", "B"]


def test_samples_are_of_the_first_and_the_newest_episodes() -> None:
    board = a_board()
    for episode in range(20):
        board.samples(episode, [{"prompt": "p", "completion": "x" * 1000}])
    rows = board.sample_rows()
    assert [row["episode"] for row in rows] == [19, 18, 17, 16, 15, 14, 13, 0]
    assert max(len(row["completion"]) for row in rows) == 300


@given(
    train=st.lists(st.floats(-1e6, 1e6), max_size=600),
    held_out=st.lists(st.floats(-1e6, 1e6), max_size=5),
)
def test_every_point_is_drawn_inside_the_picture(train: list[float], held_out: list[float]) -> None:
    curve = Curve(
        name="a<b & c",
        train=tuple(enumerate(train)),
        held_out=tuple((7 * v, value) for v, value in enumerate(held_out)),
    )
    root = ET.fromstring(draw([curve, curve]))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert [t.text for t in root.iter(f"{SVG}text") if t.text and "<" in t.text] == ["a<b & c"] * 2
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) >= 2 * len(held_out)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width / 2
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_a_picture_of_a_long_run_stays_small() -> None:
    train = tuple((i, math.sin(i / 100)) for i in range(20_000))
    assert len(draw([Curve(name="reward", train=train, held_out=())])) < 10_000
