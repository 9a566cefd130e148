"""What a recipe tells a person to type next."""

from __future__ import annotations

import pytest

from rlhf_flows.config import EngineConfig, StoreConfig
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
