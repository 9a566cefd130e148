"""The example of a dataset of one's own: as a program, and asked for by a recipe."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.custom_dataset import Solutions
from rlhf_flows import initialization
from rlhf_flows.config_loading import load_config
from rlhf_flows.data.dataset_kinds import DATASETS
from rlhf_flows.deployments import grpo, sft
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.store import open_store, scan
from tests.end_to_end.whole_run import commits

ROOT = Path(__file__).parents[2]
REALS_LINES = 90
"""Of `prompt_answer_dataset.py`, without the changes to configurations that ReaL asks for."""


seen: list[str] = []


class Problems(Solutions):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {"prompt_ids": item["prompt_ids"], "problem": self.rows[index]["problem"]}


def length(completion: str, problem: str) -> float:
    seen.append(problem)
    return -float(len(completion))


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "_initial", [])
    monkeypatch.setattr(DATASETS, "_registered", {})
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen2(tmp_path_factory.mktemp("tiny"), hidden_size=64, num_layers=2)


def test_the_program_is_at_most_half_as_long_as_reals() -> None:
    lines = (ROOT / "examples/custom_dataset.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= REALS_LINES / 2


@pytest.mark.timeout(400)
def test_the_program_runs_and_learns(
    tmp_path: Path, services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FLOWS_CACHE", str(tmp_path / "cache"))
    sizes = {
        "store.url": tmp_path / "runs",
        "run_name": "own",
        "runtime.num_episode": 3,
        "runtime.sample_per_episode": 128,
        "runtime.train_global_batch_size": 32,
    }
    words = [f"{name}={value}" for name, value in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["custom_dataset", *words])
    runpy.run_path(str(ROOT / "examples/custom_dataset.py"), run_name="__main__")
    assert scan(open_store(tmp_path / "runs"), "own").trained_episodes == 3
    losses = [commit["metrics"]["loss"] for commit in commits(tmp_path / "runs", "own")]
    assert losses[2] < 0.75 * losses[0]


def test_a_recipe_asks_for_it_by_where_it_is_imported_from(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"problem": "1+1=", "steps": ["2"]}))
    words = [f"model={tiny}", f"store.url={tmp_path / 'runs'}", f"dataset.path={file}"]
    kind = "dataset.type=examples.custom_dataset:Solutions"

    def check(*more: str) -> None:
        sft.RECIPE.check(load_config(sft.SFTConfig, [*words, *more]))

    check(kind)
    check(kind, "dataset.args.separator=+")
    with pytest.raises(ConfigError, match=r"no argument 'seperator' \(nearest: 'separator'\)"):
        check(kind, "dataset.args.seperator=+")
    with pytest.raises(ConfigError, match=r"has no 'Solution' .*nearest: 'Solutions'"):
        check(kind.removesuffix("s"))
    with pytest.raises(ConfigError, match=r"unknown setting 'dataset.typ'.*dataset\.type"):
        check("dataset.typ=x")
    with pytest.raises(DataError, match="line 1: 'prompt' is missing"):
        check()
    config = load_config(sft.SFTConfig, [*words[:2], f"dataset={file}"])
    assert (config.dataset.path, config.dataset.type) == (str(file), None)


def test_prompts_of_grpo_may_be_of_ones_own_kind(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"problem": "1+1=", "steps": ["2"]}))
    words = [f"model={tiny}", f"prompts.path={file}", "generation.max_new_tokens=8"]
    words += [f"store.url={tmp_path / 'runs'}", "sampler=transformers"]
    words += [f"reward={__name__}:length", "runtime.sample_per_episode=8"]
    kind = "prompts.type=examples.custom_dataset:Solutions"
    with pytest.raises(DataError, match="has a column 'response_ids', which the run itself writes"):
        grpo.RECIPE.check(load_config(grpo.GRPOConfig, [*words, kind]))
    grpo.RECIPE.check(load_config(grpo.GRPOConfig, [*words, f"prompts.type={__name__}:Problems"]))
    assert seen == ["1+1="]
