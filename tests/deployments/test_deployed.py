"""The list of deployments: the same as prefect.yaml, and what is added to it or chosen from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_flows.deployments.deployed import OWN_DEPLOYMENTS, _import_folder, chosen, of_module
from rlhf_flows.deployments.recipe import OWN
from rlhf_flows.errors import ConfigError
from rlhf_flows.services.automations import TAG
from rlhf_flows.services.deploying import ENVIRONMENT
from rlhf_flows.services.scheduling import Schedule, parse_schedule
from tests.deployments.worker import POOL, ROOT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))
    return found


def test_prefect_yaml_has_the_same_deployments_as_the_list(project: dict[str, Any]) -> None:
    there = [(d["name"], d["entrypoint"], d["description"]) for d in project["deployments"]]
    assert there == [(d.name, d.entrypoint, d.description) for d in OWN_DEPLOYMENTS]


def test_prefect_yaml_gives_them_the_same_pool_tags_and_environment(
    project: dict[str, Any],
) -> None:
    for deployment in project["deployments"]:
        assert deployment["tags"] == [TAG]
        assert deployment["work_pool"]["name"] == POOL
        variables = deployment["work_pool"]["job_variables"]
        assert variables == {"working_dir": "{{ $PWD }}", "env": dict(ENVIRONMENT)}
        assert "concurrency_limit" not in deployment  # the work pool's counts


def test_every_recipe_is_deployed() -> None:
    assert {d.entrypoint.rpartition(".")[2] for d in OWN_DEPLOYMENTS} == set(OWN)


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["grpo"], ["grpo/quickstart", "grpo/train"]),
        (["grpo/train"], ["grpo/train"]),
        (["quickstart", "generate"], ["grpo/quickstart", "generate/run"]),
        ([], [d.full_name for d in OWN_DEPLOYMENTS]),
    ],
)
def test_some_are_chosen_by_flow_by_full_name_or_by_recipe(
    only: list[str], names: list[str]
) -> None:
    assert [d.full_name for d in chosen(OWN_DEPLOYMENTS, only)] == names


def test_an_unknown_one_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no deployment 'grop' \(nearest: 'grpo'\)"):
        chosen(OWN_DEPLOYMENTS, ["grop"])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes_of_test.py").write_text(
        "from rlhf_flows.deployments import find_recipe\n"
        "from rlhf_flows.deployments.grpo import grpo\n"
        "nightly = find_recipe('grpo').derived('nightly', 'every night', model='m').flow()\n"
        "TEXT = 'no flow'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "recipes_of_test", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["recipes_of_test", "recipes_of_test:nightly"])
def test_a_recipe_of_ones_own_is_deployed_from_its_module(module: Path, name: str) -> None:
    (own,) = of_module(name)
    assert own.full_name == "nightly/train"
    assert own.entrypoint == "recipes_of_test.nightly"
    assert own.import_folder == str(module)
    assert own.description == "Every night."


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("recipes_of_test:TEXT", "is a str, expected a Prefect flow"),
        ("recipes_of_test:nightl", r"has no 'nightl' \(nearest: 'nightly'\)"),
        ("recipes_of_tests", "there is no module 'recipes_of_tests'"),
        ("json", "there is no Prefect flow in json"),
    ],
)
def test_what_is_no_flow_is_said(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        of_module(name)


def test_an_installed_module_needs_no_folder_on_the_path() -> None:
    assert _import_folder("prefect.flows") is None
    assert _import_folder("tests.deployments.worker") == str(ROOT)


def test_a_schedule_is_a_deployment_and_a_cron() -> None:
    found = parse_schedule("grpo/quickstart=0 3 * * *", timezone="Europe/Berlin")
    assert found.deployment == "grpo/quickstart"
    assert found.cron is not None
    assert (found.cron.cron, found.cron.timezone) == ("0 3 * * *", "Europe/Berlin")
    none = Schedule(deployment="grpo/train", cron=None)
    assert parse_schedule("grpo/train=none", timezone="UTC") == none


@pytest.mark.parametrize(
    ("text", "timezone", "says"),
    [
        ("grpo/train=every night", "UTC", "'every night' is no cron expression"),
        ("grpo/train=0 25 * * *", "UTC", "'0 25 [*] [*] [*]' is no cron expression"),
        ("grpo/train=0 3 * * *", "Berlin", "--timezone 'Berlin' is unknown"),
        ("0 3 * * *", "UTC", "FLOW/NAME=CRON"),
        ("grpo=0 3 * * *", "UTC", "FLOW/NAME=CRON"),
    ],
)
def test_a_wrong_schedule_is_refused(text: str, timezone: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_schedule(text, timezone=timezone)
