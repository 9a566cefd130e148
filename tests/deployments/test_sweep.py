"""A grid of settings: its points, its names, what is refused before anything starts, its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows import cli
from rlhf_flows.deployments import find_recipe
from rlhf_flows.deployments.sweep import (
    Point,
    deployment_of,
    is_complete,
    parse_grid,
    plan_sweep,
    remember,
)
from rlhf_flows.deployments.sweep_runs import run_here
from rlhf_flows.deployments.sweep_table import draw_table, sweep_rows
from rlhf_flows.errors import ConfigError
from rlhf_flows.store import RunLayout, commit_json, end_attempt, open_store, take_attempt
from tests.deployments.worker import outcome, wait_for

BASE = ["warmup_steps=4"]
GRID = ["learning_rate=1e-4,3e-4", "runtime.num_episode=1,2"]


def plan(*words: str, **more: Any) -> Any:
    return plan_sweep(find_recipe("quickstart"), [*BASE, *words], **more)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=1,2", ("1", "2")),
        ("a=[1,2],[3]", ("[1,2]", "[3]")),
        ("a={b: 1, c: 2},{b: 3}", ("{b: 1, c: 2}", "{b: 3}")),
        ("a='x,y',z", ("'x,y'", "z")),
        ("a=1, 2", ("1", "2")),
    ],
)
def test_values_are_parted_by_commas_outside_of_brackets_and_quotes(
    word: str, values: Sequence[str]
) -> None:
    assert parse_grid([word]) == ([], {"a": tuple(values)})


@pytest.mark.parametrize("word", ["a=[1,2]", "a='x,y'", "a=", "a={b: 1, c: 2}"])
def test_one_value_is_no_grid(word: str) -> None:
    assert parse_grid([word]) == ([word], {})


def test_the_points_are_the_product_each_with_a_name_and_values_as_typed() -> None:
    sweep = plan(*GRID, name="mine")
    assert [p.run for p in sweep.points] == ["mine-001", "mine-002", "mine-003", "mine-004"]
    found = [(p.config.learning_rate, p.config.runtime.num_episode) for p in sweep.points]
    assert found == [(1e-4, 1), (1e-4, 2), (3e-4, 1), (3e-4, 2)]
    assert {p.config.warmup_steps for p in sweep.points} == {4}
    assert sweep.points[1].settings == {"learning_rate": "1e-4", "runtime.num_episode": "2"}


def test_the_same_command_names_the_same_sweep_and_another_one_another() -> None:
    assert plan(*GRID).name == plan(*GRID).name
    assert plan(*GRID).name != plan(GRID[0]).name
    assert plan(*GRID).name.startswith("quickstart-sweep-")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "several values"),
        (["learning_rate=1e-4,-1"], "learning_rate"),
        (["learning_rat=1e-4,1e-5"], "did you mean 'learning_rate'"),
        (["learning_rate=1e-4,,1e-5"], "empty value"),
        (["learning_rate=1e-4,1e-4"], "twice"),
        (["learning_rate=1e-4,1e-5", "learning_rate=1"], "stands twice"),
        (["run_name=a,b"], "names its runs itself"),
        (["store.url=a,b"], "one store"),
        (["learning_rate"], "is no setting"),
    ],
)
def test_a_wrong_grid_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*words)


def test_a_name_belongs_to_one_grid(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    remember(store, plan(*GRID, name="mine"))
    remember(store, plan(*GRID, name="mine"))
    with pytest.raises(ConfigError, match="another grid"):
        remember(store, plan(GRID[0], name="mine"))
    commit_json(store, RunLayout("run").run_json, {"config": {}})
    with pytest.raises(ConfigError, match="is a run of"):
        remember(store, plan(*GRID, name="run"))


def finish(url: Path, run: str, outcome: Any, **metrics: float) -> None:
    """A run of one episode as it lies in a store."""
    store, layout = open_store(str(url)), RunLayout(run)
    commit_json(store, layout.run_json, {"config": {}})
    number = take_attempt(store, run, flow_run_id=None, changed={}).number
    if metrics:
        commit_json(store, layout.trained(0), {"metrics": metrics})
    if outcome is not None:
        end_attempt(store, run, number, outcome)


def test_the_table_has_the_best_first_and_those_that_have_nothing_last(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    remember(store, plan(*GRID, name="mine"))
    finish(tmp_path, "mine-001", "completed", reward=0.5, kl=0.3)
    finish(tmp_path, "mine-002", "failed")
    finish(tmp_path, "mine-003", "completed", reward=0.7, kl=0.4)
    # What held-out prompts say of the newest version goes before what training said.
    commit_json(
        store, RunLayout("mine-001").evaluation_done(1, "abc"), {"metrics": {"reward": 0.9}}
    )
    rows = sweep_rows(store, "mine")
    assert [row["run"] for row in rows] == ["mine-001", "mine-003", "mine-002", "mine-004"]
    assert rows[0]["metrics"] == {"reward": 0.9, "kl": 0.3}
    assert [row["state"] for row in rows] == ["completed", "completed", "failed", "waiting"]
    assert [row["run"] for row in sweep_rows(store, "mine", by="kl")][:2] == [
        "mine-001",
        "mine-003",
    ]
    assert [row["run"] for row in sweep_rows(store, "mine", by="kl", lowest=False)][:1] == [
        "mine-003"
    ]
    assert draw_table("mine", rows).row_count == 4
    with pytest.raises(ConfigError, match="has 'rewrd': they have kl, reward"):
        sweep_rows(store, "mine", by="rewrd")
    with pytest.raises(ConfigError, match="no sweep 'other'"):
        sweep_rows(store, "other")


def test_a_run_is_complete_when_it_said_so_and_is_long_enough(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(tmp_path, "done", "completed", reward=1.0)
    finish(tmp_path, "failed", "failed", reward=1.0)
    finish(tmp_path, "killed", None, reward=1.0)
    runs = ("done", "failed", "killed", "none")
    assert [is_complete(store, run, num_episode=1) for run in runs] == [True, False, False, False]
    assert not is_complete(store, "done", num_episode=2)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlhf-flows", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_point_that_cannot_run_is_refused_before_the_first_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    words = ["model=a,b", "prompts=prompts.jsonl", "reward=math:sqrt"]
    assert command(monkeypatch, "sweep", "grpo", *words) == 2
    assert "no model folder at" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "runs").rglob("*.json"))


@pytest.mark.slow  # two processes of the command line
def test_a_run_that_fails_stops_no_other_and_says_why() -> None:
    points = [
        Point(run=f"bad-{i}", settings={"a": str(i)}, words=(f"learning_rate=-{i}",), config=None)
        for i in (1, 2)
    ]
    said: list[str] = []
    failed = run_here("quickstart", points, file=None, parallel=2, say=said.append)
    assert failed == ["bad-1", "bad-2"]
    for i in (1, 2):
        (told,) = [text for text in said if text.startswith(f"bad-{i} failed with exit code 2")]
        assert "setting 'learning_rate'" in told
        assert f"found -{i}" in told


@pytest.mark.long  # two quickstarts up to their first episode, and the one of them to its end
def test_ctrl_c_ends_the_runs_that_are_under_way_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    log = tmp_path / "sweep.log"
    words = ["quickstart", "learning_rate=1e-4,3e-4", "runtime.num_episode=4", "--name", "s"]
    sweep = [sys.executable, "-m", "rlhf_flows.cli", "sweep", *words, "--parallel", "2"]

    def started() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                sweep,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    first = started()
    attempts = [tmp_path / f"runs/s-00{n}/attempts/000001.json" for n in (1, 2)]
    wait_for("both runs", lambda: all(a.exists() for a in attempts) or None)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does it
    assert first.wait(120) == 130, log.read_text("utf-8")
    assert "interrupted: the same command goes on" in log.read_text("utf-8")
    for n in (1, 2):
        assert outcome(tmp_path / f"runs/s-00{n}", 1) == "cancelled"

    assert started().wait(280) == 0, log.read_text("utf-8")
    rows = sweep_rows(open_store(str(tmp_path / "runs")), "s")
    assert [row["state"] for row in rows] == ["completed", "completed"]


def test_the_table_of_a_command_is_read_by_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(open_store(str(tmp_path)), plan(*GRID, name="mine"))
    finish(tmp_path, "mine-002", "completed", reward=0.5)
    assert command(monkeypatch, "sweep-table", "mine", "--store", str(tmp_path), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["run"] == "mine-002"
    assert rows[0]["settings"] == {"learning_rate": "1e-4", "runtime.num_episode": "2"}


def test_every_recipe_of_ours_has_the_deployment_that_a_sweep_submits_to() -> None:
    import yaml

    from rlhf_flows.deployments import OWN

    text = (Path(__file__).parents[2] / "prefect.yaml").read_text("utf-8")
    deployed = {
        f"{d['entrypoint'].split('.')[-1]}/{d['name']}" for d in yaml.safe_load(text)["deployments"]
    }
    wanted = {deployment_of(recipe) for recipe in OWN} - {"grpo/quickstart"}
    assert wanted <= deployed
