"""Blocks that an older version of this package saved are still of use to this one.

The older version is real: a class of the same type with the fields that it had, which saves what
it has to say to a real server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from prefect.blocks.core import Block
from prefect.utilities.dispatch import get_registry_for_type
from pydantic import Field, SecretStr

from rlhf_flows.blocks import EpisodeStore, RayCluster, RunDefaults

SECRET = "s3cr3t-of-the-test"
pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.filterwarnings("ignore:Type 'Older'"),
]


def save_older(make: Callable[[], type[Block]], name: str, **fields: Any) -> None:
    """By a class that has the place of ours where Prefect looks classes up, until it has saved."""
    known = get_registry_for_type(Block)
    assert known is not None
    before = dict(known)
    try:
        make()(**fields).save(name)
    finally:
        known.clear()
        known.update(before)


def older_cluster() -> type[Block]:
    """As of 0.1: no runtime environment, no required resources."""

    class Older(Block):
        """The Ray cluster."""

        _block_type_name: ClassVar[str | None] = "RLHF Ray Cluster"
        _block_type_slug: ClassVar[str | None] = "rlhf-ray-cluster"
        address: str | None = Field(default=None)
        token: SecretStr | None = Field(default=None)
        lease_seconds: float = 900.0

    return Older


def older_store() -> type[Block]:
    """As of 0.1: no addressing style, no budget of retries, and a field that has gone since."""

    class Older(Block):
        """The episode store."""

        _block_type_name: ClassVar[str | None] = "RLHF Episode Store"
        _block_type_slug: ClassVar[str | None] = "rlhf-episode-store"
        url: str
        access_key_id: str | None = None
        secret_access_key: SecretStr | None = None
        a_field_that_has_gone: int = 3

    return Older


def test_a_cluster_saved_by_the_older_class_loads_and_has_the_new_defaults() -> None:
    save_older(older_cluster, "old", address="10.0.0.7:6379", token=SECRET, lease_seconds=60)
    loaded = RayCluster.load("old")
    assert isinstance(loaded, RayCluster)
    assert (loaded.address, loaded.lease_seconds) == ("10.0.0.7:6379", 60)
    assert loaded.required_resources == {}
    assert loaded.runtime_env.for_ray() == {}
    assert loaded.token is not None
    assert loaded.token.get_secret_value() == SECRET
    assert SECRET not in repr(loaded)


def test_a_store_with_a_field_that_has_gone_loads() -> None:
    save_older(older_store, "old", url="s3://b/runs", access_key_id="key", secret_access_key=SECRET)
    for validate in (True, False):
        loaded = EpisodeStore.load("old", validate=validate)
        assert isinstance(loaded, EpisodeStore)
        assert loaded.to_config().url == "s3://b/runs"
        assert loaded.secret_access_key is not None
        assert loaded.secret_access_key.get_secret_value() == SECRET


def test_an_old_block_that_is_saved_again_has_the_schema_of_now() -> None:
    save_older(older_cluster, "again", address="10.0.0.8:6379", token=SECRET)
    loaded = RayCluster.load("again")
    loaded.required_resources = {"GPU": 8}
    loaded.save("again", overwrite=True)
    after = RayCluster.load("again")
    assert after.required_resources == {"GPU": 8}
    assert after.token is not None
    assert after.token.get_secret_value() == SECRET


def test_defaults_that_name_an_old_cluster_take_it() -> None:
    save_older(older_cluster, "part", address="10.0.0.9:6379")
    RunDefaults(cluster=RayCluster.load("part"), settings={"log_level": "INFO"}).save("whole")
    loaded = RunDefaults.load("whole")
    assert loaded.cluster is not None
    assert loaded.cluster.address == "10.0.0.9:6379"
