"""ChatLearn's listings as programs: as modules, without a source file, and in a notebook."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows import initialization
from rlhf_flows.store import RunState, open_store, scan
from tests.end_to_end.whole_run import commits

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODELS = EXAMPLES / "megatron/models"

pytestmark = pytest.mark.usefixtures("forgetful")


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` speaks for its process: other tests start from the defaults again."""
    monkeypatch.setattr(initialization, "_initial", [])
    monkeypatch.syspath_prepend(str(ROOT))


def start(
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    config: str,
    store: Path,
    words: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Runs it as `python -m` does; its names."""
    monkeypatch.setenv("RLHF_FLOWS_STORE", str(store))
    asked = [f"store.retry_budget_s={2}", *words]
    monkeypatch.setattr(sys, "argv", [program, "-c", str(EXAMPLES / config), *asked])
    return runpy.run_module(f"examples.{program}", run_name="__main__")


def runs(store: Path) -> dict[str, RunState]:
    found = open_store(store)
    names = sorted(path.name for path in store.iterdir() if (path / "run.json").exists())
    return {name: scan(found, name) for name in names}


@pytest.mark.slow
def test_the_main_file_of_the_programming_interface_runs(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("rlhf", monkeypatch, config="rlhf.yaml", store=tmp_path)
    ((name, state),) = runs(tmp_path).items()
    assert state.trained_episodes == 3
    (first, *_, last) = commits(tmp_path, name)
    assert set(first["checkpoints"]) == {"ppo_policy", "ppo_value"}
    assert last["metrics"]["ppo_policy/ups"] > first["metrics"]["ppo_policy/ups"]
    assert last["metrics"]["ppo_value/value_loss"] < first["metrics"]["ppo_value/value_loss"]


@pytest.mark.long  # all of them run in a notebook, too
def test_a_custom_flow_runs_and_what_it_evaluates_rises(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = start("custom_flow", monkeypatch, config="rlhf.yaml", store=tmp_path)
    ((name, state),) = runs(tmp_path).items()
    assert state.trained_episodes == 3
    results = names["engine"].evaluate(run_name=name)
    assert list(results) == ["reward"]
    ups = [float(batch["ups"].mean()) for batch in results["reward"]]
    assert sum(ups) / len(ups) > 0.5  # 0.48 of a policy that knows nothing
    drawn = names["engine"].graph()
    for call in ("policy.forward_step", "ppo_value.train_step", "reward.eval_step"):
        assert f'["{call}"]' in drawn


@pytest.mark.long  # all of them run in a notebook, too
def test_a_custom_engine_runs_with_and_without_an_evaluator(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("custom_engine", monkeypatch, config="pairs.yaml", store=tmp_path)
    states = list(runs(tmp_path).values())
    assert [state.trained_episodes for state in states] == [3, 3]
    assert sorted(len(state.evaluations) for state in states) == [0, 2]  # before, and at the end


@pytest.mark.long  # all of them run in a notebook, too
def test_the_main_file_of_dpo_runs(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("dpo", monkeypatch, config="pairs.yaml", store=tmp_path)
    ((name, state),) = runs(tmp_path).items()
    assert state.trained_episodes == 3
    losses = [commit["metrics"]["policy_loss"] for commit in commits(tmp_path, name)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 0.6932  # log 2: of a policy that prefers neither


def in_one_text(program: str) -> str:
    """A program with its models above it, and no import of any file of ours."""
    files = [MODELS / "letters.py"]
    files += [MODELS / f"{name}.py" for name in _imported(program)]
    files.append(EXAMPLES / f"{program}.py")
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"^from examples\.[\w.]+ import .*\n", "", text, flags=re.MULTILINE)


def _imported(program: str) -> list[str]:
    text = (EXAMPLES / f"{program}.py").read_text()
    classes = re.findall(r"^from examples.megatron.models import (\w+)", text, re.MULTILINE)
    return [re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in classes]


def test_a_program_without_a_source_file_runs(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FLOWS_STORE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["", "-c", str(EXAMPLES / "pairs.yaml")])
    exec(in_one_text("dpo"), {"__name__": "__main__"})
    ((_, state),) = runs(tmp_path).items()
    assert state.trained_episodes == 3


@pytest.mark.long
@pytest.mark.timeout(400)
def test_all_programs_run_in_a_notebook(tmp_path: Path, services: str) -> None:
    """In one kernel, a cell each: an event loop runs in it already."""
    from jupyter_client.manager import start_new_kernel

    environment = {**os.environ, "RLHF_FLOWS_STORE": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
    manager, client = start_new_kernel(startup_timeout=120, kernel_name="python3", env=environment)
    said: list[str] = []

    def run(cell: str) -> None:
        reply = client.execute_interactive(
            cell, timeout=180, output_hook=lambda message: said.append(str(message["content"]))
        )
        assert reply["content"]["status"] == "ok", "\n".join(said)[-3000:]

    try:
        for program, config in (
            ("custom_flow", "rlhf.yaml"),
            ("rlhf", "rlhf.yaml"),
            ("custom_engine", "pairs.yaml"),
            ("dpo", "pairs.yaml"),
        ):
            text = in_one_text(program).replace("init()", f"init({str(EXAMPLES / config)!r})")
            run(text)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert [state.trained_episodes for state in runs(tmp_path).values()] == [3] * 5
