"""The blocks: Prefect's own suite, what they become, and that secrets stay secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite

from rlhf_flows.blocks import EpisodeStore, RayCluster, RunDefaults
from rlhf_flows.config import ClusterConfig, StoreConfig
from rlhf_flows.errors import PoolError, ResourcesError, StoreError

BLOCKS = [RayCluster, EpisodeStore, RunDefaults]
SECRET = "s3cr3t-of-the-test"


@pytest.mark.parametrize("block", BLOCKS)
class TestPrefectsOwnSuite(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, block: type[Block]) -> type[Block]:
        return block

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The suite loads the image; tests here have no network."""
        assert str(block._logo_url).startswith("https://")


def saved(block: Block, name: str) -> dict[str, Any]:
    """Saves a block; what another process, which imports nothing of ours, then loads."""
    block.save(name, overwrite=True)
    slug = block.get_block_type_slug()
    program = (
        "import json, sys\nfrom prefect.blocks.core import Block\n"
        f"block = Block.load({f'{slug}/{name}'!r}, validate=False)\n"
        "print(json.dumps({'class': type(block).__name__, 'repr': repr(block),"
        " 'config': block.to_config().model_dump(mode='json')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert SECRET not in done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_cluster_is_found_through_the_entry_point_with_its_token_masked() -> None:
    block = RayCluster(address="10.0.0.7:6379", token=SECRET, lease_seconds=60)
    found = saved(block, "cluster")
    assert found["class"] == "RayCluster"
    assert found["config"] == ClusterConfig(address="10.0.0.7:6379", lease_s=60).model_dump()
    loaded = RayCluster.load("cluster")
    assert isinstance(loaded, RayCluster)
    assert loaded.token is not None
    assert loaded.token.get_secret_value() == SECRET


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_store_is_found_through_the_entry_point_with_its_secret_masked() -> None:
    block = EpisodeStore(url="s3://bucket/runs", access_key_id="key", secret_access_key=SECRET)
    found = saved(block, "store")
    assert found["class"] == "EpisodeStore"
    assert found["config"] == StoreConfig(url="s3://bucket/runs").model_dump()
    loaded = EpisodeStore.load("store")
    assert isinstance(loaded, EpisodeStore)
    assert loaded.secret_access_key is not None
    assert loaded.secret_access_key.get_secret_value() == SECRET


def test_no_secret_is_in_a_configuration_or_a_representation() -> None:
    cluster = RayCluster(token=SECRET)
    store = EpisodeStore(
        url="s3://bucket", access_key_id="key", secret_access_key=SECRET, session_token=SECRET
    )
    for block in (cluster, store):
        assert SECRET not in f"{block!r} {block} {block.to_config()} {block.model_dump_json()}"


def test_credentials_are_exported_to_this_process_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    for name in names:
        monkeypatch.setenv(name, "before")  # so that the test leaves nothing behind
        monkeypatch.delenv(name)
    store = EpisodeStore(
        url="s3://bucket",
        endpoint_url="http://127.0.0.1:9000",
        access_key_id="key",
        secret_access_key=SECRET,
    )
    cluster = RayCluster(token=SECRET)
    assert not set(names) & set(os.environ)
    store.export_credentials()
    cluster.export_credentials()
    assert [os.environ[n] for n in names] == ["http://127.0.0.1:9000", "key", SECRET, SECRET]


def test_every_setting_of_a_part_of_the_configuration_is_a_field_of_its_block() -> None:
    cluster = RayCluster(
        address="10.0.0.7:6379",
        num_cpus=3,
        object_store_memory_bytes=1 << 27,
        lease_seconds=60,
        keep_pools_on_cancel=True,
    )
    store = EpisodeStore(url="s3://bucket", single_writer=True, retry_budget_s=5)
    for config in (cluster.to_config(), store.to_config()):
        default = type(config)()
        same = [n for n in type(config).model_fields if getattr(config, n) == getattr(default, n)]
        assert not same, f"{type(config).__name__}: not set by its block"


def test_half_of_the_credentials_is_refused() -> None:
    with pytest.raises(ValueError, match="belong together"):
        EpisodeStore(url="s3://bucket", access_key_id="key")


def test_two_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        RayCluster(token=SECRET, token_path="/etc/ray/token")


def test_a_folder_that_keeps_its_promise_is_checked_and_left_clean(tmp_path: Path) -> None:
    EpisodeStore(url=str(tmp_path / "runs")).check()
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_a_store_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="file"):
        EpisodeStore(url=str(tmp_path / "file")).check()


def test_a_running_cluster_answers_with_its_resources(ray_head: str) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    resources = RayCluster(address=ray_head, token=token).check()
    assert resources["CPU"] == 8


def test_a_cluster_with_less_than_its_block_requires_is_refused(ray_head: str) -> None:
    block = RayCluster(address=ray_head, token=os.environ["RAY_AUTH_TOKEN"])
    block.required_resources = {"CPU": 8, "GPU": 4}
    with pytest.raises(ResourcesError, match="has 0 GPU, required_resources says 4"):
        block.check()


def test_a_cluster_that_is_not_there_is_an_error_that_names_its_address() -> None:
    with pytest.raises(PoolError, match=r"127\.0\.0\.1:1 "):
        RayCluster(address="127.0.0.1:1").check()
