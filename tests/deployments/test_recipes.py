"""Each recipe as the command line finds it, and the chain of them that an example ships."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from examples.reviews.data import make
from rlhf_flows.config import StoreConfig
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments import OWN, find_recipe, known_recipes, register_recipe
from rlhf_flows.deployments.model_folders import model_folder
from rlhf_flows.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples/reviews"
STAGES = ("sft", "reward_model", "ppo", "dpo", "online_dpo", "grpo", "evaluate", "generate")
TINY = {
    "num_episode": 1, "sample_per_episode": 32, "train_global_batch_size": 32,
    "generation_batch_size": 32, "eval_episode_interval": 0,
}  # fmt: skip


def run(name: str, store: Path, *words: str, **runtime: Any) -> Any:
    """A stage of the example, shortened to one step."""
    recipe = find_recipe(name)
    short = {**TINY, **runtime}
    config = load_config(
        recipe.config,
        [f"store.url={store}", *(f"runtime.{k}={v}" for k, v in short.items()), *words],
        file=EXAMPLES / f"{name}.yaml",
    )
    recipe.check(config)
    return asyncio.run(recipe.run(config))


@pytest.mark.parametrize("name", OWN)
def test_every_recipe_is_found_says_what_it_does_and_has_a_flow(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.description == OWN[name] == known_recipes()[name]
    schema = recipe.config.model_json_schema()
    unsaid = [field for field, about in schema["properties"].items() if "$ref" not in about]
    assert all("description" in schema["properties"][field] for field in unsaid)


@pytest.mark.slow  # five runs: a minute and more
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("services")
def test_each_stage_takes_what_the_one_before_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("reviews"))
    store = tmp_path / "runs"
    schedule = ("optimizer.total_steps=20",)
    assert run("sft", store, *schedule).run.version == 1
    assert run("reward_model", store, *schedule).run.version == 1
    sampled = ("sampler=transformers", "generation.max_new_tokens=6")
    assert run("ppo", store, *sampled).run.version == 1
    assert run("dpo", store).run.version == 1
    done = run(
        "generate", store, *sampled, "model=run:reviews-ppo@1/ppo_policy", "run_name=read",
        "output=read.jsonl",
    )  # fmt: skip
    assert "reward" in done.run.evaluations[0]
    rows = [json.loads(line) for line in Path("read.jsonl").read_text("utf-8").splitlines()]
    asked = Path("reviews/held_out_prompts.jsonl").read_text("utf-8")
    prompts = [json.loads(line) for line in asked.splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts]
    assert {"completion", "finish_reason", "reward", "is_review"} <= rows[0].keys()


def test_no_file_is_written_over_and_none_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    recipe = find_recipe("generate")
    (tmp_path / "old.jsonl").write_text("kept\n")
    for output, message in (
        (tmp_path / "old.jsonl", "is there already"),
        (tmp_path, "is there already"),
        (tmp_path / "no/new.jsonl", "which is no folder"),
    ):
        words = ["model=m", "prompts=p.jsonl", f"output={output}"]
        with pytest.raises(ConfigError, match=message):
            recipe.check(load_config(recipe.config, words))
    assert (tmp_path / "old.jsonl").read_text() == "kept\n"


@pytest.mark.parametrize("name", STAGES)
def test_the_settings_of_each_example_are_known(name: str) -> None:
    recipe = find_recipe(name)
    assert load_config(recipe.config, file=EXAMPLES / f"{name}.yaml")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("run:", "does not name what a run trained"),
        ("run:a@b", "does not name what a run trained"),
        ("run:nobody", "there is no run 'nobody'"),
    ],
)
def test_a_model_that_no_run_trained_is_refused(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        model_folder(model, StoreConfig(url=str(tmp_path)))


def test_a_folder_is_what_it_is() -> None:
    assert model_folder("some/folder", StoreConfig()) == Path("some/folder")


def test_a_registered_recipe_has_other_defaults_which_words_override() -> None:
    mine = find_recipe("ppo").derived("mine", "mine", ppo={"kl_coef": 0.2}, reward="a.b:c")
    register_recipe(mine)
    assert known_recipes()["mine"] == "mine"
    words = ["model=m", "prompts=p.jsonl", "ppo.gamma=0.9"]
    config: Any = load_config(find_recipe("mine").config, words)
    assert (config.ppo.kl_coef, config.ppo.gamma, config.reward.function) == (0.2, 0.9, "a.b:c")
    words += ["ppo.kl_coef=0.3", "reward=d.e:f"]
    config = load_config(mine.config, words)
    assert (config.ppo.kl_coef, config.reward.function) == (0.3, "d.e:f")
    again = mine.derived("again", ppo={"gamma": 0.8})
    both: Any = again.config(model="m", prompts="p")  # type: ignore[call-arg]
    assert (both.ppo.kl_coef, both.ppo.gamma) == (0.2, 0.8)
    with pytest.raises(ConfigError, match="one of rlhf_flows' own"):
        register_recipe(find_recipe("ppo").derived("sft"))
    with pytest.raises(ConfigError, match=r"no setting 'rewrd' \(nearest: 'reward'\)"):
        mine.derived("mistyped", rewrd="a.b:c")
    with pytest.raises(ConfigError, match=r"unknown setting 'ppo.kl_coeff': did you mean 'ppo.kl_"):
        load_config(mine.config, [*words, "ppo.kl_coeff=1"])


def test_an_installed_package_may_name_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_recipes.py").write_text(
        "from rlhf_flows import find_recipe\n"
        "THEIRS = find_recipe('sft').derived('theirs', 'what it does')\n"
    )
    about = tmp_path / "their_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    points = "[rlhf_flows.recipes]\ntheirs = their_recipes:THEIRS\n"
    (about / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_recipe("theirs").description == "what it does"
    assert known_recipes()["theirs"] == "what it does"


def test_a_form_of_a_registered_recipe_shows_its_defaults() -> None:
    mine = find_recipe("ppo").derived("formed", reward="a.b:c", ppo={"kl_coef": 0.2})
    schema = parameter_schema(mine.flow()).model_dump_for_openapi()
    shown = schema["definitions"]["PPOConfig"]
    assert shown["properties"]["reward"]["default"] == "a.b:c"
    assert shown["properties"]["ppo"]["default"] == {"kl_coef": 0.2}
    assert shown["required"] == ["model", "prompts"]
    assert not validate({"config": {"model": "m", "prompts": "p"}}, schema, raise_on_error=False)
    assert "reward" in find_recipe("ppo").config.model_json_schema()["required"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rlhf_flows.deployments.ppo:RECIPES", r"has no 'RECIPES' \(nearest: 'RECIPE'\)"),
        ("rlhf_flows.deployments.ppo:build", "is a function, expected a Recipe"),
        ("rlhf_flows.deployment.ppo:RECIPE", r"no module 'rlhf_flows.deployment' \(nearest"),
        (":ppo", "write it as package.module:name"),
    ],
)
def test_what_is_no_recipe_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipe(name)


def test_what_a_users_module_registers_is_known_once_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_kinds.py").write_text(
        "from rlhf_flows import ModelInterface, register_interface\n"
        "class Flat(ModelInterface):\n"
        "    def inference(self, data): return {}\n"
        "register_interface('flat-reward', Flat)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "reviews")
    recipe = find_recipe("grpo")
    words = [
        f"model={folder / 'model'}", f"prompts={folder / 'prompts.jsonl'}",
        "reward.interface=flat-reward", "sampler=transformers", "generation.max_new_tokens=8",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="unknown interface 'flat-reward'"):
        recipe.check(load_config(recipe.config, words))
    with pytest.raises(ConfigError, match="'my_kind' of `imports` cannot be imported"):
        recipe.check(load_config(recipe.config, [*words, "imports=[my_kind]"]))
    recipe.check(load_config(recipe.config, [*words, "imports=[my_kinds]"]))


def test_a_dataset_is_its_path_or_its_fields_in_files_and_in_forms() -> None:
    schema = parameter_schema(find_recipe("sft").flow()).model_dump_for_openapi()
    for found in ("rows.jsonl", {"path": "rows.jsonl", "type": "mine", "args": {"a": 1}}):
        config = {"model": "m", "dataset": found}
        assert not validate({"config": config}, schema, raise_on_error=False)
        made = find_recipe("sft").config.model_validate(config)
        assert made.model_dump(mode="json")["dataset"] == found
        assert type(made).model_validate(made.model_dump(mode="json")) == made
    assert validate({"config": {"model": "m", "dataset": {"pth": "x"}}}, schema)
