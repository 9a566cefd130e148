"""A child run: whose weights it begins with, what it takes over, what stays its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import rlhf_flows
from rlhf_flows import cli
from rlhf_flows.attempt.checks import check
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments import find_recipe
from rlhf_flows.deployments.children import parent_settings
from rlhf_flows.errors import ConfigError, RunConflictError
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.store import RunLayout, commit_json, config_digest, open_store, upload_folder
from tests.end_to_end.whole_run import toy_engine

LAYOUT = RunLayout("parent")
REWARD = "rlhf_flows.deployments.sort_digits:reward"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parent of one trained version in the store `runs`, as GRPO commits it; two models."""
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "max_position_embeddings": 64}
    build_tiny_qwen2(tmp_path / "model", seed=0, **small)
    trained = build_tiny_qwen2(tmp_path / "trained", seed=1, **small)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    recipe = find_recipe("grpo")
    config = load_config(
        recipe.config,
        ["model=model", "prompts=prompts.jsonl", f"reward={REWARD}", "sampler=transformers",
         "generation.max_new_tokens=4", "generation.temperature=0.7", "grpo.kl_coef=0.1",
         "runtime.num_inference_per_prompt=2", "runtime.sample_per_episode=4",
         "runtime.num_episode=1"],
    )  # fmt: skip
    store = open_store(tmp_path / "runs")
    asked = {"recipe": "grpo", **config.model_dump(mode="json", exclude={"run_name", "init_from"})}
    asked["flows"] = {"environment": [], "trainer": []}
    record = {"run": "parent", "config": asked, "digest": config_digest(asked)}
    commit_json(store, LAYOUT.run_json, record | {"created_at": "2026-01-01T00:00:00+00:00"})
    weights = upload_folder(store, LAYOUT.weights_prefix(1, "trainer-x"), trained)
    entry = {"module": "trainer", "digest": "d1", "weights": weights.to_json(), "state": None}
    commit_json(
        store, LAYOUT.trained(0), {"version": 1, "checkpoints": {"trainer": entry}, "metrics": {}}
    )
    return tmp_path


def child(*words: str, init_from: str = "parent@1") -> Any:
    recipe = find_recipe("grpo")
    defaults = parent_settings(recipe.config, init_from, words)
    return load_config(recipe.config, words, defaults=defaults)


@pytest.mark.usefixtures("place")
def test_settings_are_the_parents_where_the_child_says_no_other() -> None:
    config = child("optimizer.learning_rate=1e-4", "run_name=child")
    assert config.optimizer.learning_rate == 1e-4
    assert (config.generation.temperature, config.grpo.kl_coef) == (0.7, 0.1)
    assert (config.model, config.runtime.num_episode) == ("model", 1)
    assert (config.run_name, config.init_from, config.store.url) == ("child", "parent@1", "runs")


def test_what_is_trained_and_what_follows_begins_with_the_parents_weights(place: Path) -> None:
    """The frozen reference keeps the model of the configuration."""
    engine: Any = find_recipe("grpo")
    described = check(engine.engine(child())._describe())
    folders = {name: getattr(m, "path", None) for name, m in described.modules.items()}
    weights = place / "runs" / LAYOUT.weights_prefix(1, "trainer-x")
    assert folders["trainer"] == folders["policy"] == weights
    assert folders["reference"] == place / "model"


def test_the_parent_stands_in_the_run_and_is_of_its_identity(place: Path) -> None:
    recipe = find_recipe("grpo")
    recipe.check(child("run_name=child"))
    parent = rlhf_flows.open_run("runs", "child").parent
    store = open_store("runs").url
    assert parent == {"run": "parent", "version": 1, "store": store, "digests": {"trainer": "d1"}}
    recipe.check(child("run_name=child"))  # the same again
    with pytest.raises(RunConflictError, match="init_from"):
        recipe.check(child("run_name=child").model_copy(update={"init_from": None}))
    recipe.check(child("run_name=alone").model_copy(update={"init_from": None}))
    alone = json.loads((place / "runs/alone/run.json").read_text())["config"]
    assert alone["init_from"] is None
    assert "parent" not in alone


@pytest.mark.usefixtures("place")
def test_what_cannot_be_a_parent_is_said() -> None:
    for init_from, says in (
        ("parent", "write RUN@VERSION"),
        ("paren@1", r"no run 'paren' .*nearest: 'parent'"),
    ):
        with pytest.raises(ConfigError, match=says):
            child(init_from=init_from)
    engine: Any = find_recipe("grpo")
    with pytest.raises(ConfigError, match="no trained version 2: it has versions 1 to 1"):
        check(engine.engine(child(init_from="parent@2"))._describe())
    with pytest.raises(ConfigError, match=r"recipe 'grpo', and its .*model=run:parent@1"):
        parent_settings(find_recipe("sft").config, "parent@1")
    toys = toy_engine().configure({"init_from": "parent@1"})
    with pytest.raises(ConfigError, match=r"'policy' \(ToyPolicy\) has no `path`"):
        toys.check()
    quickstart = find_recipe("quickstart")
    with pytest.raises(ConfigError, match="train grpo"):
        quickstart.check(quickstart.config(init_from="parent@1"))


@pytest.mark.long
def test_a_child_trains_on_from_there(
    place: Path,
    services: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a learning rate that moves nothing, its first version is the parent's."""
    words = ["rlhf-flows", "train", "grpo", "--init-from", "parent@1", "run_name=child"]
    words += ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]
    monkeypatch.setattr(sys, "argv", [*words, f"cluster.address={services}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code, capsys.readouterr()
    (file,) = (place / "runs/child/weights/version=000001").rglob("*.safetensors")
    mine, theirs = load_file(file), load_file(place / "trained/model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all((mine[name] - theirs[name]).abs().max() < 1e-20 for name in mine)
    run = rlhf_flows.open_run("runs", "child")
    assert run.audit(digests=True).ok
    assert run.parent is not None
    monkeypatch.setattr(sys, "argv", ["rlhf-flows", "runs", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    of = {r["run"]: r["parent"] for r in json.loads(capsys.readouterr().out)["runs"]}
    assert of == {"child": "parent@1", "parent": None}
