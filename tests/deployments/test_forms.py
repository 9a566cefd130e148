"""The custom-run form of every deployment: words, order, choices, and what the server refuses.

Judged by what Prefect stores of a flow (`parameter_schema`) and by its own check of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from pydantic import ValidationError

from rlhf_flows.deployments import OWN, find_recipe
from rlhf_flows.deployments.quickstart import quickstart
from rlhf_flows.form_schema import plain_title

TRAINING = {"model": "m", "dataset": "rows.jsonl"}
REINFORCING = {"model": "m", "prompts": "prompts.jsonl", "reward": "package.module:function"}
NEEDED: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "sft": TRAINING,
    "reward_model": TRAINING,
    "dpo": TRAINING,
    "ppo": REINFORCING,
    "grpo": REINFORCING,
    "online_dpo": REINFORCING,
    "generate": {"model": "m", "prompts": "prompts.jsonl"},
    "evaluate": {"run": "my-run"},  # or a model with prompts
}
LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
_SCHEMAS: dict[str, dict[str, Any]] = {}


def schema_of(name: str) -> dict[str, Any]:
    """What Prefect keeps with the deployment."""
    if name not in _SCHEMAS:
        flow = quickstart if name == "quickstart" else find_recipe(name).flow()
        _SCHEMAS[name] = parameter_schema(flow).model_dump_for_openapi()
    return _SCHEMAS[name]


def form_of(name: str) -> dict[str, dict[str, Any]]:
    """The fields of the form, in the order in which it shows them."""
    properties = schema_of(name)["definitions"][find_recipe(name).config.__name__]["properties"]
    return dict(sorted(properties.items(), key=lambda item: item[1]["position"]))


def fields_of(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of a form, those of sections too."""
    for model, definition in schema_of(name)["definitions"].items():
        for field, shown in definition.get("properties", {}).items():
            yield f"{model}.{field}", shown


def refused(name: str, **config: Any) -> list[str]:
    """What Prefect says before it makes a run: `field: message`."""
    parameters = {"config": {**NEEDED[name], **config}}
    found = validate(parameters, schema_of(name), raise_on_error=False)
    return sorted(f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found)


@pytest.mark.parametrize("name", OWN)
def test_every_field_has_a_title_in_words_and_says_in_a_sentence_what_it_is(name: str) -> None:
    for where, shown in fields_of(name):
        title, said = shown["title"], shown.get("description", "")
        assert re.fullmatch(r"[A-Z][^_]*", title), f"{where}: title {title!r}"
        assert said[:1].isupper() or said[:1] == "`" or re.match(r"\w+: ", said), f"{where}: {said}"
        assert said.endswith("."), f"{where}: {said}"
        assert len(said.split()) >= 3, f"{where}: {said}"


@pytest.mark.parametrize("name", OWN)
def test_what_must_be_given_comes_first_and_nothing_else_is_asked_for(name: str) -> None:
    config = schema_of(name)["definitions"][find_recipe(name).config.__name__]
    needed = list(NEEDED[name])
    assert list(form_of(name))[: len(needed)] == needed
    assert config.get("required", []) == (needed if name != "evaluate" else [])
    assert list(form_of(name))[-1] == "log_level"


@pytest.mark.parametrize("name", OWN)
def test_no_field_asks_for_json_that_could_be_a_box_a_list_or_a_choice(name: str) -> None:
    as_json = {
        where.partition(".")[2]
        for where, shown in fields_of(name)
        if not {"type", "anyOf", "enum"} & shown.keys()
        or (shown.get("type") == "object" and "properties" not in shown)
    }
    assert as_json <= {"models", "args", "args_dict", "batch_generation"}


@pytest.mark.parametrize("name", OWN)
def test_the_least_that_a_person_can_fill_in_is_taken(name: str) -> None:
    assert refused(name) == []
    find_recipe(name).config.model_validate(NEEDED[name])


@pytest.mark.parametrize("name", OWN)
def test_what_the_form_sends_untouched_is_the_default(name: str) -> None:
    """The boxes that a form shows first, each with what stands in it."""
    sent: dict[str, Any] = dict(NEEDED[name])
    for field, shown in form_of(name).items():
        if "default" in shown:
            sent[field] = shown["default"]
        view = shown.get("anyOf", [{}])[0].get("properties", {})
        if view:
            sent[field] = {key: v["default"] for key, v in view.items() if "default" in v}
    assert refused(name, **sent) == []
    config = find_recipe(name).config
    assert config.model_validate(sent) == config.model_validate(NEEDED[name])


@pytest.mark.parametrize("name", OWN)
def test_all_settings_of_a_section_untouched_are_the_defaults(name: str) -> None:
    definitions = schema_of(name)["definitions"]
    config = find_recipe(name).config
    usual = config.model_validate(NEEDED[name])
    for field, shown in form_of(name).items():
        if "then" not in shown or field in NEEDED[name] or shown["anyOf"][0].get("type") == "null":
            continue
        section = definitions[shown["then"]["$ref"].rpartition("/")[2]]["properties"]
        sent = {key: v["default"] for key, v in section.items() if "default" in v}
        if field in ("reward", "eval_dataset"):
            continue
        assert refused(name, **{field: sent}) == []
        assert config.model_validate({**NEEDED[name], field: sent}) == usual


@pytest.mark.parametrize(
    ("name", "config", "messages"),
    [
        ("grpo", {"runtime": {"num_episode": 0}},
         ["config.runtime.num_episode: 0 is less than or equal to the minimum of 0"]),
        ("grpo", {"runtime": {"num_episodes": 3}},
         ["config.runtime: Additional properties are not allowed ('num_episodes' was unexpected)"]),
        ("sft", {"optimizer": {"schedule": "cosine"}},
         ["config.optimizer: 'total_steps' is a required property"]),
        ("grpo", {"grpo": {"aggregation": "fixed"}},
         ["config.grpo: 'max_length' is a required property"]),
        ("grpo", {"generation": {"temperature": 3}},
         ["config.generation.temperature: 3 is greater than the maximum of 2.0"]),
        ("grpo", {"log_level": "LOUD"},
         [f"config.log_level: 'LOUD' is not one of {LEVELS}"]),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_before_the_run_and_named_by_its_field_alone(
    name: str, config: dict[str, Any], messages: list[str]
) -> None:
    assert refused(name, **config) == messages
    with pytest.raises(ValidationError):
        find_recipe(name).config.model_validate({**NEEDED[name], **config})


def test_a_schedule_with_its_horizon_is_taken() -> None:
    assert refused("sft", optimizer={"schedule": "cosine", "total_steps": 20}) == []


@pytest.mark.parametrize("value", [None, "held_out.jsonl", {"path": "rows.parquet", "type": "t"}])
def test_the_server_takes_all_that_a_field_may_be(value: Any) -> None:
    assert refused("grpo", eval_prompts=value) == []


def test_the_server_takes_null_for_what_the_form_leaves_out() -> None:
    assert refused("grpo", run_name=None, runtime={"train_global_batch_size": None}) == []


def test_all_settings_of_an_algorithm_leave_the_temperature_to_the_sampler() -> None:
    """Sent with a default, it would contradict another temperature of the sampler."""
    models = {"grpo": "GRPOSettings", "ppo": "PPOSettings", "online_dpo": "DPOSettings"}
    for name, field in models.items():
        assert "default" not in schema_of(name)["definitions"][field]["properties"]["temperature"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("retry_budget_s", "Retry budget (seconds)"),
        ("num_threads", "Number of threads"),
        ("kl_coef", "KL weight"),
        ("memory_mb", "Memory (MiB)"),
        ("seed", "Seed"),
    ],
)
def test_a_title_is_made_of_a_name(name: str, title: str) -> None:
    assert plain_title(name) == title
