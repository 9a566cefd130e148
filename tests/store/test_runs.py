"""One run name, one configuration."""

from __future__ import annotations

import pytest

from rlhf_flows.errors import ConfigError, RunConflictError, UserError
from rlhf_flows.store import config_digest, open_run, read_json

CONFIG = {
    "seed": 1,
    "models": {"policy": {"path": "m", "replicas": 2}},
    "sizes": (1, 2),
    "tags": {},
}
MAY_CHANGE = frozenset({"models.policy.replicas", "logging"})


def opened(store, may_change=MAY_CHANGE, **changes):
    return open_run(store, "r", config=CONFIG | changes, may_change=may_change)


def test_a_run_is_created_once_and_joined_ever_after(store):
    first, second = opened(store), opened(store)
    assert first.is_new
    assert not second.is_new
    assert first.changed == second.changed == {}
    assert first.config == second.config == CONFIG | {"sizes": [1, 2]}
    assert first.digest == second.digest == config_digest(first.config)
    assert read_json(store, "r/run.json")["config"] == first.config


def test_another_configuration_under_the_name_is_refused_with_every_difference(local_store):
    opened(local_store)
    with pytest.raises(RunConflictError) as refusal:
        opened(local_store, seed=2, models={"policy": {"path": "n", "replicas": 2}}, extra=None)
    message = str(refusal.value)
    assert "seed: 1 then, 2 now" in message
    assert 'models.policy.path: "m" then, "n" now' in message
    assert "extra: (absent) then, null now" in message
    assert "replicas" not in message
    assert "another run_name" in message
    assert isinstance(refusal.value, UserError)


def test_a_field_that_is_gone_is_a_difference(local_store):
    opened(local_store)
    without = {key: value for key, value in CONFIG.items() if key != "sizes"}
    with pytest.raises(RunConflictError, match=r"sizes: \[1, 2\] then, \(absent\) now"):
        open_run(local_store, "r", config=without, may_change=frozenset())


def test_a_field_that_came_with_a_later_version_is_none_at_its_default(local_store):
    opened(local_store)
    later = CONFIG | {"fresh": {"limit": 3, "on": False}}

    def opened_later(given):
        return open_run(local_store, "r", config=later, given=given, may_change=MAY_CHANGE)

    assert opened_later(given={"seed": 1}).changed == {}
    with pytest.raises(RunConflictError, match=r"fresh\.limit: \(absent\) then, 3 now") as refusal:
        opened_later(given={"seed": 1, "fresh": {"limit": 3}})
    assert "fresh.on" not in str(refusal.value)


def test_fields_that_may_change_do_and_are_reported(local_store):
    opened(local_store)
    models = {"policy": {"path": "m", "replicas": 8}}
    record = opened(local_store, models=models, logging={"level": "debug"})
    assert record.changed == {"models.policy.replicas": 8, "logging.level": "debug"}
    assert record.config["models"]["policy"]["replicas"] == 2, "run.json stays as first asked"


def test_a_name_that_may_change_frees_no_field_that_merely_begins_like_it(local_store):
    opened(local_store, logging_dir="a")
    with pytest.raises(RunConflictError, match="logging_dir"):
        opened(local_store, logging_dir="b")


def test_the_digest_does_not_depend_on_the_order_of_fields():
    assert config_digest({"a": 1, "b": {"c": 2, "d": 3}}) == config_digest(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert config_digest({"a": 1}) != config_digest({"a": 2})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_what_json_cannot_keep_is_refused_before_anything_is_written(local_store, value):
    with pytest.raises(ConfigError, match="cannot be kept as JSON"):
        opened(local_store, odd=value)
    assert local_store.list() == []


def test_a_run_name_that_escapes_its_folder_is_refused(local_store):
    with pytest.raises(ConfigError, match="cannot be named"):
        open_run(local_store, "../other", config={}, may_change=frozenset())
    assert local_store.list() == []
