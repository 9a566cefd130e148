"""What a recipe tells a person to type next."""

from __future__ import annotations

import pytest

from rlhf_flows.config import EngineConfig, StoreConfig
from rlhf_flows.deployments import quickstart
from rlhf_flows.deployments.recipe import store_words


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs", ""),
        ("s3://bucket/prefix", " --store s3://bucket/prefix"),
        ("my runs", " --store 'my runs'"),
    ],
)
def test_a_command_names_the_store_unless_it_is_the_default(url: str, words: str) -> None:
    config = EngineConfig(store=StoreConfig(url=url))
    assert store_words(config) == words
    assert store_words(config, "store.url=") == words.replace("--store ", "store.url=")


@pytest.mark.parametrize("name", ["mine", "mine-warmup"])
def test_the_quickstart_goes_on_by_the_name_of_either_of_its_runs(name: str) -> None:
    assert quickstart._run_name(quickstart.QuickstartConfig(run_name=name)) == "mine"
