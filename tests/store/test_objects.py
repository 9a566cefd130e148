"""What every store promises, on files and on S3."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.errors import (
    ObjectNotFoundError,
    StoreDamageError,
    StoreError,
    StoreUnavailableError,
)
from rlhf_flows.store import FileRecord, open_store
from rlhf_flows.store.objects import check_key

RACER = """
import sys
from rlhf_flows.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(store.put_if_absent(f"race/{number}", sys.argv[2].encode()) for number in range(30)))
"""


def keys(store, prefix=""):
    return [info.key for info in store.list(prefix)]


def test_the_first_put_wins_and_the_object_never_changes(store):
    assert store.put_if_absent("a/b.json", b"first")
    assert not store.put_if_absent("a/b.json", b"second")
    assert store.get("a/b.json") == b"first"


def test_each_key_has_one_winner_among_racing_processes(store, start_python):
    racers = [start_python(RACER, store.url, str(number)) for number in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [int(racer.communicate()[0]) for racer in racers]
    assert sum(wins) == 30
    held = [store.get(f"race/{number}").decode() for number in range(30)]
    assert wins == [held.count(str(number)) for number in range(3)]


def test_a_missing_object_has_an_error_of_its_own(store):
    with pytest.raises(ObjectNotFoundError, match="no such object"):
        store.get("nowhere")
    with pytest.raises(ObjectNotFoundError):
        pickle.loads(pickle.dumps(store)).get("nowhere/at/all")


def test_a_listing_is_sorted_sized_and_of_whole_folders(store):
    for key in ("run-1/b", "run-1/a/deep/er", "run-10/c", "run-1.json"):
        store.put_if_absent(key, key.encode())
    listed = store.list("run-1")
    assert [info.key for info in listed] == ["run-1/a/deep/er", "run-1/b"]
    assert [info.size for info in listed] == [len("run-1/a/deep/er"), len("run-1/b")]
    assert keys(store) == sorted(["run-1/b", "run-1/a/deep/er", "run-10/c", "run-1.json"])
    assert keys(store, "absent") == []


def test_a_listing_shows_what_another_client_has_just_written(store):
    other = copy.copy(store)
    for number in range(5):
        assert len(store.list("fresh")) == number
        other.put_if_absent(f"fresh/{number}", b"")
    assert len(store.list("fresh")) == 5


def test_deleted_objects_are_gone_and_deleting_again_is_no_error(store):
    store.put_if_absent("x/1", b"")
    store.put_if_absent("x/2", b"")
    for _ in range(2):
        store.delete(["x/1", "never/there"])
        assert keys(store) == ["x/2"]
    assert store.put_if_absent("x/1", b"new")


def test_a_store_pickles_as_its_url_alone(store):
    store.put_if_absent("k", b"v")
    pickled = pickle.dumps(store)
    assert b"testing" not in pickled
    assert pickle.loads(pickled).url == store.url
    assert pickle.loads(pickled).get("k") == b"v"
    assert open_store(store.url).get("k") == b"v"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "to-upload"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "sub" / "empty").write_bytes(b"")
    return folder


def test_a_folder_comes_back_as_it_went(store, folder, tmp_path):
    records = store.put_folder(folder, "checkpoints/uid")
    assert [record.name for record in records] == ["model.safetensors", "sub/empty"]
    store.get_folder("checkpoints/uid", records, tmp_path / "back")
    for record in records:
        assert (tmp_path / "back" / record.name).read_bytes() == (folder / record.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "model.safetensors",
        "sub",
    ]


def test_a_flipped_byte_is_found_and_never_stands_at_its_name(store, folder, tmp_path):
    records = store.put_folder(folder, "good")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[150_000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    store.put_folder(folder, "bad")
    with pytest.raises(StoreDamageError, match=r"bad/model.safetensors is not what was committed"):
        store.get_folder("bad", records, tmp_path / "back")
    assert not (tmp_path / "back" / "model.safetensors").exists()


def test_a_file_that_is_cut_short_or_missing_is_found(store, folder, tmp_path):
    records = store.put_folder(folder, "uid")
    longer = replace(records[0], size=records[0].size + 1)
    with pytest.raises(StoreDamageError, match="300000 bytes"):
        store.get_folder("uid", [longer], tmp_path / "back")
    with pytest.raises(ObjectNotFoundError):
        store.get_folder("uid", [replace(records[0], name="absent")], tmp_path / "back")
    assert not [path for path in (tmp_path / "back").rglob("*") if path.is_file()]


def test_an_empty_folder_is_not_uploaded(store, tmp_path):
    with pytest.raises(StoreError, match="holds no file"):
        store.put_folder(tmp_path, "nothing")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "a\0"]
)
def test_a_key_cannot_leave_the_store(local_store, key):
    with pytest.raises(StoreError, match="cannot be a key"):
        local_store.put_if_absent(key, b"")
    with pytest.raises(StoreError, match="cannot be a key"):
        FileRecord.from_json({"name": key, "size": 0, "sha256": ""})


@given(st.text())
def test_a_key_is_refused_or_stays_below_its_root(key):
    try:
        check_key(key)
    except StoreError:
        return
    assert os.path.normpath(f"/root/{key}") == f"/root/{key}"


def test_opening_says_what_is_wrong_with_a_url(tmp_path):
    (tmp_path / "file").write_text("")
    for url, reason in (
        ("gs://bucket", "unknown scheme 'gs'"),
        ("s3://key:secret@bucket/x", "never in the URL"),
        ("s3://", "name the bucket"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot write to the store"),
        ("/proc/no/store", "cannot write to the store"),
    ):
        with pytest.raises(StoreError, match=reason):
            open_store(url)


def test_opening_says_that_a_bucket_is_missing(s3_server):
    with pytest.raises(StoreError, match="there is no bucket 'absent'"):
        open_store("s3://absent/x")


def test_opening_says_that_credentials_are_missing(bucket, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{bucket}")


def test_an_s3_store_that_is_down_is_a_fault_that_may_pass(bucket, monkeypatch):
    store = open_store(f"s3://{bucket}", retry_budget_s=0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailableError, match=r"no answer from http://127.0.0.1:9"):
        copy.copy(store).list()


def test_ceph_s_dress_of_a_412_is_a_lost_race(s3_store, s3_fault):
    s3_fault("bare_412")
    assert s3_store.put_if_absent("k", b"first")
    assert not s3_store.put_if_absent("k", b"second")


def test_many_pages_of_an_s3_listing_are_listed_and_deleted_completely(s3_store, monkeypatch):
    monkeypatch.setattr("rlhf_flows.store.s3._KEYS_PER_CALL", 10)
    numbers = range(31)
    for number in numbers:
        s3_store.put_if_absent(f"many/{number:04d}", b"")
    assert keys(s3_store, "many") == [f"many/{number:04d}" for number in numbers]
    s3_store.delete(keys(s3_store, "many"))
    assert keys(s3_store) == []


def test_uploads_that_nobody_completed_are_swept(s3_store):
    s3_store._call("create_multipart_upload", Key=f"{s3_store.prefix}run/big")
    assert keys(s3_store) == []
    assert s3_store.sweep("other") == 0
    # moto says that every upload began in 2010, which is young enough here.
    assert s3_store.sweep("run", older_than_s=3e9) == 0
    assert s3_store.sweep("run") == 1
    assert s3_store.sweep("run") == 0


WRITER = """
import os, sys, time
from rlhf_flows.store import open_store
store = open_store(sys.argv[1])
if sys.argv[2] == "while writing":
    os.fsync = lambda descriptor: (print("here", flush=True), time.sleep(60))
else:
    os.link = lambda source, target: (print("here", flush=True), time.sleep(60))
store.put_if_absent("run/shard", b"x" * 100_000)
"""


@pytest.mark.parametrize("instant", ["while writing", "before the link"])
def test_a_killed_writer_leaves_nothing_that_a_listing_shows(local_store, start_python, instant):
    local_store.put_if_absent("run/other", b"")
    writer = start_python(WRITER, local_store.url, instant)
    assert writer.stdout.readline() == "here\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    folder = local_store.root / "run"
    assert len(list(folder.iterdir())) == 2, "the leftover this test is about"
    assert keys(local_store) == ["run/other"]
    assert not (folder / "shard").exists()
    assert local_store.sweep() == 0, "what is young may belong to a living writer"
    assert local_store.sweep(older_than_s=0) == 1
    assert local_store.put_if_absent("run/shard", b"whole")
    assert [path.name for path in sorted(folder.iterdir())] == ["other", "shard"]


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(local_store):
    def churn(number):
        for turn in range(20):
            assert local_store.put_if_absent(f"deep/er/{number}-{turn}", b"")
            local_store.delete([f"deep/er/{number}-{turn}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert keys(local_store) == []


def test_a_full_disk_is_said_and_leaves_nothing(local_store, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    local_store.patience.budget_s = 0.1
    (local_store.root / "run").mkdir()
    with pytest.raises(StoreUnavailableError, match="the disk is full"):
        local_store.put_if_absent("run/x", b"data")
    assert list((local_store.root / "run").iterdir()) == []


def test_a_file_system_without_hard_links_is_named(local_store, monkeypatch):
    def link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="has no hard links"):
        local_store.put_if_absent("x", b"data")


def test_a_second_upload_to_the_same_local_prefix_is_refused(local_store, folder):
    local_store.put_folder(folder, "uid")
    with pytest.raises(StoreError, match="something is there already"):
        local_store.put_folder(folder, "uid")


def test_a_link_whose_answer_was_lost_is_recognised(local_store, monkeypatch):
    """As on NFS: it took effect, and what is heard is an error that may pass."""
    answers = [OSError(5, "Input/output error"), None]
    link = os.link

    def loses_the_answer(source, target):
        link(source, target)
        if answer := answers.pop(0):
            raise answer

    with local_store.working_folder() as folder:
        (folder / "model").write_bytes(b"w")
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", loses_the_answer)
            local_store.put_folder(folder, "uid")
        assert local_store.get("uid/model") == b"w"
        # Another file at that name is another matter.
        (folder / "more").mkdir()
        (folder / "more" / "model").write_bytes(b"w")

        def comes_too_late(source, target):
            target.write_bytes(b"of somebody else")
            link(source, target)

        monkeypatch.setattr(os, "link", comes_too_late)
        with pytest.raises(StoreError, match="other/model: File exists"):
            local_store.put_folder(folder / "more", "other")


def test_a_working_folder_is_empty_and_goes_with_its_block(store, tmp_path):
    with store.working_folder() as folder:
        assert list(folder.iterdir()) == []
        (folder / "weights").mkdir()
        (folder / "weights" / "model").write_bytes(b"w" * 1000)
        records = store.put_folder(folder / "weights", "uid")
    assert not folder.exists()
    assert keys(store) == ["uid/model"]
    store.get_folder("uid", records, tmp_path / "back")
    assert (tmp_path / "back" / "model").read_bytes() == b"w" * 1000


def test_what_a_killed_writer_left_in_a_working_folder_is_hidden_and_swept(local_store):
    with local_store.working_folder() as folder:
        (folder / "model").write_bytes(b"half")
        left = folder.with_name(folder.name + "-left")
        shutil.copytree(folder, left)
    assert keys(local_store) == []
    assert local_store.sweep(older_than_s=-10) == 1
    assert not left.exists()
