"""The terminal: a live view that fits, and lines that can be read when piped."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Mapping

import pytest
from rich.console import Console

from rlhf_flows.reporting.pace import Pace, in_words
from rlhf_flows.reporting.terminal import TerminalProgress

METRICS: Mapping[str, float] = dict.fromkeys(
    ("reward", "exact", "loss", "kl", "entropy", "response_length", "logprob_gap"), 0.123456
)


def play(progress: TerminalProgress, episodes: int = 2) -> None:
    """Two episodes, as the phases tell them: scoring ends while the rollout of the next begins."""
    progress.begin("a-run", episodes)
    for episode in range(episodes):
        progress.started("rollout", episode, 4)
        progress.started("scoring", episode, 4)
        for done in range(1, 5):
            progress.advanced("rollout", episode, done)
            progress.advanced("scoring", episode, done)
        progress.finished("rollout", episode, 1.0, {"rows": 512.0})
        progress.finished("scoring", episode, 1.0, {"rows": 512.0, **METRICS})
        progress.started("training", episode, 2)
        progress.advanced("training", episode, 2)
        progress.finished("training", episode, 1.0, METRICS)
        progress.finished("evaluation", episode + 1, 1.0, METRICS)


def test_piped_it_is_a_line_an_episode_and_an_evaluation_without_control_characters() -> None:
    written = io.StringIO()
    with TerminalProgress(Console(file=written, width=60), num_episode=2) as progress:
        play(progress)
    lines = written.getvalue().splitlines()
    assert len(lines) == 2 + 2 * 2
    assert "\x1b" not in written.getvalue()
    assert "episode    0  reward 0.123" in lines[2]


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_no_line_of_the_live_view_is_wider_than_the_terminal(columns: int) -> None:
    """In a pseudo-terminal of that width, in a process of its own, as a person has it."""
    code = (
        "from rich.console import Console\n"
        "from rlhf_flows.reporting.terminal import TerminalProgress\n"
        "from tests.reporting.test_terminal import play\n"
        "with TerminalProgress(Console(), num_episode=3) as p: play(p, 3)\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**env, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert child.wait(timeout=60) == 0, written.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= columns
    # Through with it, nothing is waited for.
    last = {line.split()[0]: line for line in lines}
    assert "waits" not in last["scoring"]
    assert "episode 3" in last["rollout"]
    assert "3 of 3 episodes" in plain
    assert "samples/s" in plain


def test_a_phase_that_has_all_there_is_waits_for_the_one_before() -> None:
    console = Console(file=io.StringIO(), width=80)
    progress = TerminalProgress(console, num_episode=1)
    progress.started("rollout", 0, 4)
    progress.started("scoring", 0, 4)
    progress.advanced("rollout", 0, 1)
    progress.advanced("scoring", 0, 1)
    notes = {task.description: task.fields["note"] for task in progress._bars.tasks}
    assert notes == {"rollout": "episode 1", "scoring": "waits for rollout"}


def test_pace_counts_the_last_ten_episodes() -> None:
    pace = Pace()
    for episode in range(20):
        pace.mark(episode / 100, at_s=1000.0 * episode)  # slow at first
    for episode in range(20, 31):
        pace.mark(episode / 100, at_s=20_000.0 + 2 * episode)
    assert pace.left_s(at_s=20_060.0) == pytest.approx(140.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 s"), (720, "12 min"), (3 * 3600 + 300, "3 h 05 min"), (52 * 3600, "2 d 04 h")],
)
def test_durations_are_said_as_people_do(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
