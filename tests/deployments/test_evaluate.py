"""The recipe that evaluates versions of a run: which versions, whose settings, by which name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments import find_recipe
from rlhf_flows.deployments.evaluate import build
from rlhf_flows.deployments.evaluated_run import EvaluatedRun, versions_of
from rlhf_flows.errors import ConfigError
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.store import RunLayout, commit_json, open_store, read_json, scan

RUN = EvaluatedRun(name="a", config={}, newest=7, deleted=frozenset({1}), module="trainer")


@pytest.mark.parametrize(
    ("asked", "step", "found"),
    [
        ("all", 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("all", 3, [0, 3, 6]),
        ("2-4", 1, [2, 3, 4]),
        ("5-", 1, [5, 6, 7]),
        ("-2", 1, [0, 1, 2]),
        ("1-99", 2, [1, 3, 5, 7]),
        ("newest", 1, [7]),
        ("3", 1, [3]),
        (0, 1, [0]),
        ([5, 0, 5], 1, [0, 5]),
        ("5,0", 1, [0, 5]),
    ],
)
def test_versions_are_a_list_a_range_or_a_word(asked: Any, step: int, found: list[int]) -> None:
    assert versions_of(RUN, asked, step=step) == found


@pytest.mark.parametrize("asked", [8, [0, 8], "8-", "4-2", "-", "some", [], "1,x", -1])
def test_versions_that_the_run_has_not_are_refused(asked: Any) -> None:
    with pytest.raises(ConfigError, match="versions="):
        versions_of(RUN, asked)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    build_tiny_qwen2(folder / "model", hidden_size=32, num_layers=1, max_position_embeddings=64)
    for name in ("prompts", "held_out", "other"):
        lines = [f'{{"prompt": "{name} {i}"}}' for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def length(completion: str) -> float:
    return float(len(completion))


def words(place: Path, *more: str) -> list[str]:
    return [
        f"model={place}/model", f"prompts={place}/prompts.jsonl",
        f"eval_prompts={place}/held_out.jsonl", f"reward={__name__}:length", "sampler=transformers",
        "generation.max_new_tokens=6", f"store.url={place}/runs", "runtime.num_episode=2",
        "runtime.sample_per_episode=16", "runtime.num_inference_per_prompt=4",
        "runtime.generation_batch_size=4", "runtime.eval_num_inference_per_prompt=2",
        "runtime.seed=3", *more,
    ]  # fmt: skip


def go(recipe: str, *settings: str) -> Any:
    found = find_recipe(recipe)
    config = load_config(found.config, settings)
    found.check(config)
    return asyncio.run(found.run(config)).run


def ways(place: Path, run: str) -> dict[int, set[str]]:
    """Version -> digests of its evaluations that are done."""
    found: dict[int, set[str]] = {}
    for (version, digest), state in scan(open_store(f"{place}/runs"), run).evaluations.items():
        if state.done:
            found.setdefault(version, set()).add(digest)
    return found


@pytest.mark.long  # three runs of real models
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("services")
def test_it_evaluates_as_the_run_does_unless_it_is_told_otherwise(place: Path) -> None:
    go("grpo", *words(place, "run_name=r"))
    own = ways(place, "r")
    assert set(own) == {0, 2}
    (digest,) = own[0]
    here = (f"store.url={place}/runs", "run=r")
    result = go("evaluate", *here)
    assert ways(place, "r") == {v: {digest} for v in (0, 1, 2)}
    assert sorted(result.evaluations) == [0, 1, 2]
    assert result.run == "r"
    # The same weights, sampled otherwise, are another evaluation.
    greedy = go("evaluate", *here, "versions=1", "generation.temperature=0")
    assert sorted(greedy.evaluations) == [1]
    found = ways(place, "r")
    assert len(found[1]) == 2
    assert found[0] == found[2] == {digest}
    done = RunLayout("r").evaluation_done(1, digest)
    assert read_json(open_store(f"{place}/runs"), done)["rows"] == 16


def record(place: Path, run: str, **config: Any) -> tuple[str, str]:
    """A run that has a record and has trained nothing."""
    url = f"{place}/records"
    store = open_store(url)
    commit_json(store, RunLayout(run).run_json, {"config": config})
    return f"store.url={url}", f"run={run}"


def told(*settings: str) -> Any:
    return build(load_config(find_recipe("evaluate").config, settings))


def test_what_is_not_said_is_as_the_run_has_it(place: Path) -> None:
    engine = told(
        *record(
            place, "full", model=f"{place}/model", eval_prompts=f"{place}/held_out.jsonl",
            prompts={"path": "p", "type": "prompt"}, generation={"max_new_tokens": 5},
            eval_generation={"max_new_tokens": 7}, reward="math:sqrt", sampler="transformers",
            runtime={"seed": 3, "generation_batch_size": 8, "sample_per_episode": 64},
            models={"policy": {"num_replica": 2, "sync_frequency": 4}, "trainer": {}},
        )
    )  # fmt: skip
    config: Any = engine.config
    assert config.generation.max_new_tokens == 7
    assert config.prompts.type == "prompt"
    assert config.runtime.seed == 3
    assert config.runtime.samples_per_shard == 8
    assert set(config.models) == {"policy"}
    assert config.models["policy"].num_replica == 2
    assert config.models["policy"].sync_frequency is None
    backfill = engine._backfill
    assert backfill is not None
    assert backfill.settings is None
    assert backfill.versions == (0,)


@pytest.mark.parametrize(
    ("word", "is_other"),
    [
        ("generation.temperature=0.5", True),
        ("reward=math:cos", True),
        ("max_model_len=32", True),
        ("runtime.generation_batch_size=4", True),
        ("generation.max_new_tokens=5", False),
        ("models.policy.num_replica=2", False),
        ("cluster.lease_s=60", False),
    ],
)
def test_what_changes_the_results_changes_their_name_and_nothing_else_does(
    place: Path, word: str, is_other: bool
) -> None:
    about = record(
        place, "plain", model=f"{place}/model", eval_prompts=f"{place}/held_out.jsonl",
        generation={"max_new_tokens": 5}, reward="math:sqrt", sampler="transformers",
        runtime={"generation_batch_size": 8},
    )  # fmt: skip
    engine: Any = told(*about, word)
    assert engine.config.generation.max_new_tokens == 5  # the run's, where another one is said
    backfill = engine._backfill
    assert (backfill.settings is not None) == is_other


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"model": "m"}, [], "no held-out prompts"),
        ({"recipe": "toy"}, [], r"names no `model`.*engine.evaluate"),
    ],
)
def test_a_run_that_cannot_be_evaluated_is_refused(
    place: Path, config: dict[str, Any], settings: list[str], message: str
) -> None:
    about = record(place, f"odd-{len(config)}-{next(iter(config))}", **config)
    with pytest.raises(ConfigError, match=message):
        told(*about, *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "of a run or of a model"),
        (["run=a", "model=b"], "of a run or of a model"),
        (["model=b"], "'prompts' is missing"),
        (["run=nobody"], "there is no run 'nobody'"),
    ],
)
def test_what_is_evaluated_has_to_be_named(settings: list[str], message: str, place: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        told(f"store.url={place}/none", *settings)
