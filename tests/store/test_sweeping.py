"""What killed attempts left is removed, and nothing that is, or may become, part of the run."""

from __future__ import annotations

import os
import tempfile
import time

import pytest

from rlhf_flows.errors import StoreUnavailableError
from rlhf_flows.store import (
    RunLayout,
    commit_json,
    open_store,
    sweep_folders,
    sweep_run,
    upload_folder,
)

RUN = RunLayout("run")
OLD_S = -10.0
"""As an age: everything is older."""


@pytest.fixture
def upload(store, tmp_path):
    """Uploads a folder as an attempt does; killed before its commit, it leaves just that."""

    def upload(prefix):
        local = tmp_path / prefix.replace("/", "-")
        (local / "sub").mkdir(parents=True)
        (local / "sub" / "model").write_bytes(b"weights")
        (local / "about.json").write_bytes(b"{}")
        return upload_folder(store, prefix, local)

    return upload


def commit(store, version, **folders):
    """As training does it."""
    records = {name: record.to_json() for name, record in folders.items()}
    payload = {"version": version, "checkpoints": {"policy": records}}
    assert commit_json(store, RUN.trained(version - 1), payload).mine


def prefixes(store):
    return {
        info.key.rpartition("/")[0].removesuffix("/sub")
        for info in store.list("run")
        if "version=" in info.key
    }


def test_folders_that_the_commit_of_their_version_does_not_list_go(store, upload):
    weights = upload(RUN.weights_prefix(1, "policy-a"))
    state = upload(RUN.checkpoint_prefix(1, "policy-a"))
    lost = [
        upload(RUN.weights_prefix(1, "policy-b")).prefix,
        upload(RUN.checkpoint_prefix(1, "policy-ab")).prefix,
        upload(RUN.weights_prefix(1, "policy")).prefix,
    ]
    pending = upload(RUN.weights_prefix(2, "policy-c")).prefix
    commit(store, 1, weights=weights, state=state)
    assert sorted(sweep_folders(store, "run", older_than_s=OLD_S)) == sorted(lost)
    assert prefixes(store) == {weights.prefix, state.prefix, pending}
    assert sweep_folders(store, "run", older_than_s=OLD_S) == []


def test_a_zombie_s_folder_stays_until_its_version_is_settled(store, upload):
    zombie = upload(RUN.weights_prefix(1, "zombie"))
    assert sweep_folders(store, "run", older_than_s=OLD_S) == []
    commit(store, 1, weights=zombie)
    assert sweep_folders(store, "run", older_than_s=OLD_S) == []
    assert prefixes(store) == {zombie.prefix}


def test_what_is_young_stays(store, upload):
    upload(RUN.weights_prefix(1, "loser"))
    commit(store, 1)
    assert sweep_folders(store, "run") == []
    assert sweep_run(store, "run") == 0
    assert sweep_run(store, "run", older_than_s=OLD_S) == 1


def test_what_retention_recorded_and_did_not_come_to_delete_goes(store, upload):
    kept, doomed = upload(RUN.weights_prefix(2, "new")), upload(RUN.weights_prefix(1, "old"))
    commit(store, 1, weights=doomed)
    commit(store, 2, weights=kept)
    assert commit_json(store, RUN.deleted(doomed.prefix), {"reason": "retention"}).mine
    assert sweep_folders(store, "run") == [doomed.prefix]
    assert not store.list(doomed.prefix)
    assert store.list(kept.prefix)
    assert sweep_folders(store, "run") == []


def test_other_runs_are_left_alone(store, upload):
    upload("run-2/weights/version=000001/loser")
    commit_json(store, "run-2/episodes/episode=000000/trained.json", {})
    commit(store, 1)
    assert sweep_run(store, "run", older_than_s=OLD_S) == 0
    assert len(store.list("run-2")) == 3


def test_a_store_that_is_away_is_swept_another_time(store, monkeypatch, caplog):
    def away(*_, **__):
        raise StoreUnavailableError("cannot list: no answer")

    monkeypatch.setattr(type(store), "list", away)
    assert sweep_run(store, "run") == 0
    assert "a later attempt will: cannot list: no answer" in caplog.text


def test_working_folders_of_killed_processes_go_from_the_root_of_a_local_store(local_store):
    with local_store.working_folder() as folder:
        root = folder.parent
        for name in (".tmp-old", ".tmp-empty", ".tmp-filling"):
            (root / name / "weights").mkdir(parents=True)
        (root / ".tmp-old" / "weights" / "model").write_bytes(b"half")
        (root / ".tmp-file").write_bytes(b"half of an object")
        local_store.put_if_absent("run/k", b"")
        long_ago_s = time.time() - 7200
        for path in (folder, *sorted(root.glob(".tmp-*"), reverse=True)):
            for inside in (*path.rglob("*"), path):
                os.utime(inside, (long_ago_s, long_ago_s))
        (root / ".tmp-filling" / "weights" / "model").write_bytes(b"more by the minute")
        (folder / "model").write_bytes(b"in use")
        assert local_store.sweep("run") == 3
        left = {path.name for path in root.iterdir()}
        assert left == {".tmp-filling", folder.name, "run"}


def test_working_folders_for_s3_go_once_their_process_is_gone(s3_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3_store.working_folder() as folder:
        dead = tmp_path / "rlhf-flows-work-999999999-x"
        dead.mkdir()
        (dead / "model").write_bytes(b"half")
        (tmp_path / "somebody else's").mkdir()
        assert s3_store.sweep("run") == 0
        assert s3_store.sweep("run", older_than_s=OLD_S) == 1
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "somebody else's"}


def test_a_leftover_of_a_killed_copy_is_swept_with_its_folder(tmp_path):
    """An upload from elsewhere, killed half-way: a partial file stands at its name, uncommitted."""
    store = open_store(tmp_path / "store")
    prefix = RUN.checkpoint_prefix(1, "half")
    partial = store.root / prefix / "model"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half")
    commit(store, 1)
    assert sweep_run(store, "run", older_than_s=OLD_S) == 1
    assert not partial.parent.exists()
