"""Exactly-once, and whole bytes, through every fault of the network; then one clear error."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlhf_flows.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from rlhf_flows.store import (
    ObjectStore,
    commit_bytes,
    commit_json,
    open_store,
    read_json,
    sweep_run,
)
from tests.faulty_proxy import PASSING, Fault, FaultyProxy, faulty_proxy
from tests.s3_server import real_bucket

MEGABYTE = 1 << 20


@pytest.fixture(scope="module", params=["moto", pytest.param("real", marks=pytest.mark.s3)])
def shaky_bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, FaultyProxy]]:
    with ExitStack() as stack:
        if request.param == "moto":
            bucket = request.getfixturevalue("bucket")
        else:
            bucket = stack.enter_context(real_bucket())
        proxy = stack.enter_context(faulty_proxy(os.environ["AWS_ENDPOINT_URL"]))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield bucket, proxy


@pytest.fixture
def proxy(shaky_bucket) -> Iterator[FaultyProxy]:
    _, proxy = shaky_bucket
    yield proxy
    proxy.rules.clear()
    proxy.come_back()
    proxy.seen.clear()


@pytest.fixture
def store(shaky_bucket, proxy, request) -> ObjectStore:
    bucket, _ = shaky_bucket
    return open_store(f"s3://{bucket}/{request.node.name[:40]}-{random.getrandbits(32):x}")


@pytest.fixture
def quick(monkeypatch):
    """First pauses of milliseconds: what is tested does not depend on them."""
    monkeypatch.setattr("rlhf_flows.store.patience._FIRST_PAUSE_S", 0.005)


@pytest.fixture(params=PASSING)
def fault(request) -> Fault:
    return request.param


# ---- each fault, each operation ---------------------------------------------------------------


def test_a_put_happens_once(store, proxy, fault, quick):
    proxy.spoil(fault, method="PUT", times=2)
    won = store.put_if_absent("k", b"mine")
    assert proxy.faults()[fault] in (1, 2)
    # Where the reply was lost, the retry met its own object.
    assert won or fault in ("lost reply", "late", "cut")
    assert store.get("k") == b"mine"
    assert not store.put_if_absent("k", b"other")
    assert store.get("k") == b"mine"


def test_a_commit_knows_its_own_by_the_nonce(store, proxy, fault, quick):
    proxy.spoil(fault, method="PUT", times=2)
    mine = commit_json(store, "trained.json", {"rows": 32})
    assert mine.mine
    theirs = commit_json(store, "trained.json", {"rows": 32})
    assert not theirs.mine
    assert theirs.payload == mine.payload == read_json(store, "trained.json")


def test_a_shard_is_its_own_commit(store, proxy, fault, quick):
    proxy.spoil(fault, method="PUT", times=2)
    assert commit_bytes(store, "shard", b"rows" * 1000)
    assert not commit_bytes(store, "shard", b"other rows")


def test_what_is_read_is_whole(store, proxy, fault, quick):
    data = os.urandom(200_000)
    store.put_if_absent("k", data)
    proxy.spoil(fault, method="GET", times=2)
    assert store.get("k") == data
    with pytest.raises(ObjectNotFoundError):
        store.get("nothing")


def test_a_listing_is_whole(store, proxy, fault, quick, monkeypatch):
    monkeypatch.setattr("rlhf_flows.store.s3._KEYS_PER_CALL", 2)
    for number in range(5):
        store.put_if_absent(f"f/{number}", b"")
    proxy.spoil(fault, method="GET", skip=1, times=2)  # the second page
    assert [info.key for info in store.list("f")] == [f"f/{number}" for number in range(5)]
    proxy.spoil(fault, method="POST", times=2)
    store.delete(info.key for info in store.list("f"))
    assert store.list("f") == []


@pytest.fixture
def parts(monkeypatch):
    """Parts as small as S3 lets them be."""
    monkeypatch.setattr("rlhf_flows.store.s3._PART_BYTES", 5 * MEGABYTE)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "to-upload"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(12 * MEGABYTE))
    (folder / "sub" / "config.json").write_bytes(b"{}")
    return folder


def test_a_folder_arrives_whole_part_by_part(store, proxy, fault, quick, parts, folder, tmp_path):
    proxy.spoil(fault, times=6, share=0.5)
    records = store.put_folder(folder, "uid")
    proxy.rules.clear()
    proxy.spoil(fault, times=6, share=0.5)
    store.get_folder("uid", records, tmp_path / "back")
    for record in records:
        assert (tmp_path / "back" / record.name).read_bytes() == (folder / record.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["model.safetensors", "sub"]


def test_a_lost_reply_to_the_end_of_an_upload_is_recognised(
    store, proxy, quick, parts, folder, tmp_path
):
    proxy.spoil("lost reply", method="POST", path="uploadId=", times=1)
    records = store.put_folder(folder, "uid")
    assert proxy.faults() == {"lost reply": 1}
    store.get_folder("uid", records, tmp_path / "back")


def test_an_upload_that_is_given_up_leaves_neither_an_object_nor_parts(
    store, proxy, quick, parts, folder
):
    store.patience.budget_s = 0.2
    proxy.spoil("500", method="PUT", path="partNumber=2")
    with pytest.raises(StoreUnavailableError, match=r"model\.safetensors"):
        store.put_folder(folder, "uid")
    proxy.rules.clear()
    assert "uid/model.safetensors" not in [info.key for info in store.list()]
    uploads = store._call("list_multipart_uploads", Prefix=store.prefix)
    assert uploads.get("Uploads", []) == []


# ---- races ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_writers_that_race_through_faults_exactly_one_wins(store, proxy, quick):
    """For any faults: one is told so, and what it wrote is what everybody reads."""
    writers = [copy.copy(store) for _ in range(3)]
    proxy.spoil(*PASSING, share=0.4, seconds=0.02)
    with ThreadPoolExecutor(len(writers)) as pool:
        for seed in range(50):
            proxy.random.seed(seed)

            def commit(number: int, key: str = f"race/{seed}.json"):
                return commit_json(writers[number], key, {"writer": number})

            commits = list(pool.map(commit, range(len(writers))))
            winners = [number for number, made in enumerate(commits) if made.mine]
            assert len(winners) == 1, f"seed {seed}: {winners} won"
            assert {made.payload["writer"] for made in commits} == set(winners)
            assert len({made.payload["nonce"] for made in commits}) == 1
    assert proxy.faults().keys() == set(PASSING)
    proxy.rules.clear()
    standing = [read_json(store, f"race/{seed}.json")["writer"] for seed in range(50)]
    assert len(set(standing)) > 1, "the race this test is about"


# ---- outages and the budget -------------------------------------------------------------------


OPERATIONS: dict[str, Callable[[ObjectStore, Path], object]] = {
    "put_if_absent": lambda store, _: store.put_if_absent("some/key", b""),
    "commit_json": lambda store, _: commit_json(store, "some/key", {}),
    "get": lambda store, _: store.get("some/key"),
    "list": lambda store, _: store.list("some/key"),
    "put_folder": lambda store, folder: store.put_folder(folder, "some/key"),
    "delete": lambda store, _: store.delete(["some/key"]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_stays_away_is_an_error_within_the_budget(store, proxy, operation, tmp_path):
    store.patience.budget_s = 1.5
    (tmp_path / "file").write_bytes(b"data")
    proxy.go_away()
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError) as failure:
        OPERATIONS[operation](store, tmp_path)
    assert 1.4 < time.monotonic() - started < 8
    message = str(failure.value)
    assert f"{store.url}/some/key" in message
    assert os.environ["AWS_ENDPOINT_URL"] in message
    assert "Given up after " in message
    assert "store.retry_budget_s" in message
    assert "Start again" in message
    assert "\n" not in message
    # Nobody waits for the same outage a second time.
    proxy.seen.clear()
    with pytest.raises(StoreUnavailableError):
        OPERATIONS[operation](store, tmp_path)
    # One try; aiohttp repeats what it sent over a connection that was open before, once.
    assert len(proxy.seen) <= 2


def test_an_outage_is_outlasted_by_many_at_once(store, proxy, caplog):
    store.patience.budget_s = 30
    store.put_if_absent("there", b"data")
    proxy.go_away(3)
    with ThreadPoolExecutor(8) as pool:
        put = [pool.submit(commit_json, store, f"k/{n}", {"n": n}) for n in range(4)]
        got = [pool.submit(store.get, "there") for _ in range(4)]
        assert all(commit.result().mine for commit in put)
        assert {data.result() for data in got} == {b"data"}
    said = [r.getMessage() for r in caplog.records if r.name == "rlhf_flows.store.patience"]
    assert said[0].startswith("waiting for the store, ")
    assert said[-1].startswith("the store answers again, after ")
    assert len(said) <= 4, "few lines, however many wait"


def test_a_server_that_refuses_connections_is_waited_for_as_well(bucket, monkeypatch):
    store = open_store(f"s3://{bucket}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = copy.copy(store)
    store.patience.budget_s = 1
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"no answer from http://127.0.0.1:9 .* tries"):
        store.list()
    assert 0.9 < time.monotonic() - started < 8


# ---- what is no fault of the network ----------------------------------------------------------


def test_a_wrong_secret_is_told_at_once_and_by_its_code(store, proxy):
    proxy.spoil("403")
    proxy.seen.clear()
    with pytest.raises(StoreError, match=r": SignatureDoesNotMatch: set AWS_ACCESS_KEY_ID"):
        store.list("runs")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        store.put_if_absent("k", b"")
    assert len(proxy.seen) == 2, "each was tried once"


def test_a_missing_bucket_is_told_at_once(proxy):
    with pytest.raises(StoreError, match="there is no bucket 'absent'"):
        open_store("s3://absent/x", retry_budget_s=60)
    assert len(proxy.seen) == 1


def test_an_upload_that_somebody_aborted_is_told_by_its_code_not_as_a_missing_bucket(
    store, proxy, parts, folder
):
    proxy.spoil("404", method="POST", path="uploadId=")  # moto has no such answer
    with pytest.raises(StoreError, match=r"uid/model\.safetensors: .* answered 404 NoSuchUpload"):
        store.put_folder(folder, "uid")


def test_an_account_that_may_not_list_uploads_has_its_folders_swept(store, proxy, caplog):
    proxy.spoil("403", method="GET", path=r"\?uploads")
    prefix = "run/weights/version=000001"
    store.put_if_absent(f"{prefix}/lost/model", b"")
    commit_json(store, "run/episodes/episode=000000/trained.json", {})
    assert sweep_run(store, "run", older_than_s=-10) == 1
    assert "a later attempt will: cannot list uploads of" in caplog.text
    assert store.list(prefix) == []
