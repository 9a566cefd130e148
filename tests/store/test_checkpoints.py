"""Folders of files, real only once a commit lists them."""

from __future__ import annotations

import json

import pytest

from rlhf_flows.errors import ObjectNotFoundError, StoreDamageError, StoreError
from rlhf_flows.store import (
    FolderRecord,
    RunLayout,
    commit_json,
    delete_folder,
    fetch_folder,
    read_json,
    scan,
    upload_folder,
)

LAYOUT = RunLayout("r")
PREFIX = LAYOUT.checkpoint_prefix(4, "0f3a")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "optimizer" / "0.distcp").write_bytes(b"moments" * 1000)
    return folder


def test_a_committed_folder_comes_back_through_its_record(store, folder, tmp_path):
    record = upload_folder(store, PREFIX, folder)
    commit_json(store, LAYOUT.trained(3), {"checkpoint": record.to_json()})
    found = FolderRecord.from_json(read_json(store, LAYOUT.trained(3))["checkpoint"])
    assert found == record
    assert found.size == 14_000
    fetch_folder(store, found, tmp_path / "back")
    assert (tmp_path / "back/optimizer/0.distcp").read_bytes() == b"moments" * 1000


def test_two_may_fill_one_prefix_with_files_of_their_own(store, folder, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "other.safetensors").write_bytes(b"other")
    files = [*upload_folder(store, PREFIX, folder).files, *store.put_folder(theirs, PREFIX)]
    fetch_folder(store, FolderRecord(prefix=PREFIX, files=files), tmp_path / "back")
    assert (tmp_path / "back/other.safetensors").read_bytes() == b"other"
    assert (tmp_path / "back/optimizer/0.distcp").read_bytes() == b"moments" * 1000


def test_a_byte_that_flips_in_the_store_is_found(local_store, folder, tmp_path):
    record = upload_folder(local_store, PREFIX, folder)
    path = local_store.root / PREFIX / "optimizer" / "0.distcp"
    data = bytearray(path.read_bytes())
    data[5000] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(StoreDamageError, match=r"0\.distcp is not what was committed"):
        fetch_folder(local_store, record, tmp_path / "back")


def test_deleting_is_recorded_first_and_may_be_done_again(store, folder, tmp_path):
    record = upload_folder(store, PREFIX, folder)
    for _ in range(2):
        delete_folder(store, LAYOUT, record, "newer ones are kept")
    state = scan(store, "r")
    assert state.deleted == {PREFIX}
    assert store.list(PREFIX) == []
    marker = read_json(store, LAYOUT.deleted(PREFIX))
    assert marker["reason"] == "newer ones are kept"
    assert FolderRecord.from_json(marker) == record
    with pytest.raises(ObjectNotFoundError):
        fetch_folder(store, record, tmp_path / "back")


def test_a_deletion_that_dies_halfway_is_known(local_store, folder, monkeypatch):
    record = upload_folder(local_store, PREFIX, folder)

    def delete(keys):
        raise StoreError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(local_store, "delete", delete)
        with pytest.raises(StoreError, match="killed"):
            delete_folder(local_store, LAYOUT, record, "old")
    assert scan(local_store, "r").deleted == {PREFIX}
    assert local_store.list(PREFIX)


@pytest.mark.parametrize("name", ["../../run.json", "/etc/passwd", ""])
def test_a_record_cannot_lead_out_of_its_folder(name):
    file = {"name": name, "size": 0, "sha256": ""}
    with pytest.raises(StoreError, match="cannot be a key"):
        FolderRecord.from_json({"prefix": PREFIX, "files": [file]})


@pytest.mark.parametrize("payload", [{}, {"prefix": PREFIX}, {"prefix": PREFIX, "files": [{}]}])
def test_a_record_that_is_none_is_named(payload):
    with pytest.raises(StoreDamageError, match="no record of a folder"):
        FolderRecord.from_json(json.loads(json.dumps(payload)))
