"""What a run looks like: percentage, table, curves, samples; and the picture of the curves."""

from __future__ import annotations

import json
import math
import unicodedata
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.config import RuntimeConfig
from rlhf_flows.reporting.curves import draw
from rlhf_flows.reporting.now import page
from rlhf_flows.reporting.panels import Curve, Line
from rlhf_flows.reporting.run_board import RunBoard
from rlhf_flows.reporting.sample_tables import side_by_side, text

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
    reward, exact, *_ = board.curves()
    assert (reward.name, exact.name) == ("reward", "exact")
    trained, held_out = reward.lines
    assert held_out.points == ((0, 0.1),)
    # With a staleness of 1 episode 2 was sampled by version 1.
    assert [version for version, _ in trained.points] == [0, 0, 1]


def test_what_training_measured_has_a_curve_and_what_it_did_not_has_none() -> None:
    board = a_board()
    for episode in range(2):
        metrics = {"reward": 0.5, "kl": 0.1 * episode, "clip_fraction": 0.0, "entropy": math.nan}
        board.finished("training", episode, 2.0, {**metrics, "tokens": 64.0})
    assert {c.name: c.lines[0].points for c in board.curves()} == {
        "reward": ((0, 0.5), (1, 0.5)),
        "KL to the reference": ((0, 0.0), (1, 0.1)),
        "clip fraction": ((0, 0.0), (1, 0.0)),
        "tokens/s": ((0, 32.0), (1, 32.0)),
        "seconds of an episode": ((0, 2.0), (1, 2.0)),
    }


def test_modules_that_are_trained_side_by_side_have_a_line_each_and_count_their_tokens_once() -> (
    None
):
    board = a_board()
    of_both = {"policy/kl": 0.1, "value/kl": 0.2, "policy/tokens": 10.0, "value/tokens": 10.0}
    board.finished("training", 0, 1.0, of_both)
    by_name = {c.name: [line.name for line in c.lines] for c in board.curves()}
    assert by_name["KL to the reference"] == ["policy", "value"]
    (rate,) = next(c for c in board.curves() if c.name == "tokens/s").lines
    assert rate.points == ((0, 10.0),)


def test_seconds_of_an_episode_are_those_of_its_phases() -> None:
    board = a_board()
    run_episode(board, 0, reward=0.5)
    seconds = next(c for c in board.curves() if c.is_stacked)
    assert [line.name for line in seconds.lines] == ["rollout", "scoring", "training", "sync"]
    assert sum(line.points[0][1] for line in seconds.lines) == pytest.approx(4 * 1.23456)


def test_seconds_of_an_episode_of_an_earlier_attempt_are_not_drawn_as_if_it_had_been_fast() -> None:
    board = a_board()
    board.resume({0: {"metrics": {"reward": 0.3}, "seconds": 1.0}}, first=1)
    run_episode(board, 1, reward=0.5)
    seconds = next(c for c in board.curves() if c.is_stacked)
    assert {n for line in seconds.lines for n, _ in line.points} == {1}


# ---- right now --------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_time_to_go_is_that_of_the_episodes_before() -> None:
    clock = Clock()
    board = RunBoard(
        settings=RuntimeConfig(num_episode=4, sample_per_episode=100),
        phases={"training": range(4)},
        clock=clock,
    )
    board.started("training", 0, 1)
    assert board.now().left_s is None
    for episode in range(2):
        board.started("training", episode, 1)
        clock.now += 60
        board.finished("training", episode, 60.0, {})
    assert board.now().left_s == pytest.approx(120)
    assert board.now().samples_per_s == pytest.approx(100 / 60)
    clock.now += 20
    assert board.now().left_s == pytest.approx(100)


def test_what_a_resumed_run_finds_is_no_speed() -> None:
    clock = Clock()
    board = RunBoard(
        settings=RuntimeConfig(num_episode=10), phases={"training": range(10)}, clock=clock
    )
    board.started("training", 8, 1)
    board.resume({}, first=8)  # read in the background, while the first phase is under way
    clock.now += 60
    board.finished("training", 8, 60.0, {})
    assert board.now().left_s == pytest.approx(60)


def test_the_page_says_phase_episode_samples_and_who_waits_for_whom() -> None:
    board = RunBoard(
        settings=RuntimeConfig(num_episode=3, sample_per_episode=64), phases=PHASES, clock=Clock()
    )
    board.started("rollout", 1, 4)
    board.advanced("rollout", 1, 2)
    board.started("scoring", 1, 4)
    board.advanced("scoring", 1, 2)
    shown = page(board.now())
    assert "| **rollout** | episode 2 | 32 of 64 samples |  | 13:46:40 UTC |" in shown
    assert "| **scoring** | episode 2 | 32 of 64 samples | rollout | 13:46:40 UTC |" in shown
    board.advanced("rollout", 1, 3)
    assert "32 of 64 samples | rollout" not in page(board.now())
    board.finished("rollout", 1, 1.0, {})
    assert "**rollout**" not in page(board.now())


def test_a_run_that_stopped_says_by_what_and_no_time_to_go() -> None:
    board = a_board()
    run_episode(board, 0, reward=0.5)
    board.stopped_by = "UserError"
    assert "## Stopped after 1 of 3 episodes: UserError" in page(board.now())


# ---- samples ----------------------------------------------------------------------------------


def preview(prompt: str, completion: str, reward: float = 0.5) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "reward": reward}


def test_held_out_prompts_stand_side_by_side_over_versions() -> None:
    board = a_board()
    board.samples(0, [preview("trained on", "x")])
    for version in (0, 2):
        board.held_out(version, [preview("p", f"by {version}", version / 10)])
    assert board.side_by_side() == [
        {"prompt": "p", "version 0": "0 · by 0", "version 2": "0.2 · by 2"}
    ]


def test_without_evaluations_prompts_that_came_again_do() -> None:
    board = a_board()
    board.samples(0, [preview("once", "x"), preview("twice", "a")])
    board.samples(5, [preview("twice", "b")])
    assert board.side_by_side() == [
        {"prompt": "twice", "episode 0": "0.5 · a", "episode 5": "0.5 · b"}
    ]


def test_of_many_versions_the_first_the_newest_and_some_between_are_shown() -> None:
    samples = {v: [preview("p", "c")] for v in range(41)}
    (row,) = side_by_side(samples, name="version")
    assert list(row)[1:] == [f"version {v}" for v in (0, 10, 20, 30, 40)]


@given(written=st.text(max_size=900))
def test_what_a_model_writes_is_one_printable_line_of_bounded_length(written: str) -> None:
    shown = text(written)
    assert len(shown) <= 300
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf"}
    json.dumps(shown).encode()


def test_a_long_text_ends_with_an_ellipsis_and_a_short_one_is_itself() -> None:
    assert text("é" * 300) == "é" * 300
    assert text("é" * 301) == "é" * 299 + "…"
    assert text("two\nlines \x1b[31m\u202e") == "two ⏎ lines �[31m�"


def test_without_rewards_the_curve_is_the_loss() -> None:
    board = a_board()
    board.finished("training", 0, 1.0, {"loss": 2.0})
    assert board.curves()[0].name == "loss"


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


# ---- the picture ------------------------------------------------------------------------------


@given(
    train=st.lists(st.floats(-1e6, 1e6), max_size=600),
    held_out=st.lists(st.floats(-1e6, 1e6), max_size=5),
)
def test_every_point_is_drawn_inside_its_panel(train: list[float], held_out: list[float]) -> None:
    lines = (
        Line(name="a<b & c", points=tuple(enumerate(train))),
        Line(name="held out", points=tuple((7 * v, value) for v, value in enumerate(held_out))),
    )
    curve = Curve(name="d<e & f", lines=tuple(line for line in lines if line.points))
    root = ET.fromstring(draw([curve, curve]))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert [t.text for t in root.iter(f"{SVG}text") if t.text == curve.name] == [curve.name] * 2
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) >= 2 * len(held_out)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width / 2
        assert 0 <= float(circle.attrib["cy"]) <= height


def test_parts_stand_on_top_of_each_other() -> None:
    lines = (
        Line(name="a", points=((0, 1.0), (1, 1.0))),
        Line(name="b", points=((0, 1.0), (1, 1.0))),
    )
    root = ET.fromstring(draw([Curve(name="s", lines=lines, is_stacked=True)]))
    first, second = (
        [float(corner.split()[1]) for corner in p.attrib["d"][1:-1].split("L")]
        for p in root.iter(f"{SVG}path")
        if p.attrib["class"].startswith("f")
    )
    floor, middle, top = max(first), min(first), min(second)
    assert max(second) == middle
    assert floor - middle == pytest.approx(middle - top, abs=0.2)


def test_lines_that_are_far_apart_are_drawn_by_powers_of_ten() -> None:
    lines = tuple(
        Line(name=str(value), points=((0, value), (1, value))) for value in (10.0, 1e3, 1e5)
    )
    root = ET.fromstring(draw([Curve(name="tokens/s", lines=lines, is_log=True)]))
    low, middle, high = (
        float(p.attrib["d"][1:].split("L")[0].split()[1])
        for p in root.iter(f"{SVG}path")
        if p.attrib["class"].startswith("s")
    )
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    ticks = {t.text for t in root.iter(f"{SVG}text") if t.attrib.get("text-anchor") == "end"}
    assert ticks == {"10", "100", "1000", "10k", "100k"}


def test_a_picture_of_a_long_run_stays_small() -> None:
    train = tuple((i, math.sin(i / 100)) for i in range(20_000))
    curve = Curve(name="reward", lines=(Line(name="trained on", points=train),))
    heap = Curve(name="seconds", lines=curve.lines * 5, is_stacked=True)
    assert len(draw([curve])) < 6_000
    assert len(draw([*[curve] * 9, heap])) < 60_000
