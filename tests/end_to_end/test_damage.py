"""Bytes that rot in the store: found by who reads them, named, and made again to the same bits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.data.stream import ShardHandle, StreamDataset
from rlhf_flows.errors import StoreDamageError
from tests.end_to_end.test_resume import forget
from tests.end_to_end.whole_run import learn, shard_digests, toy_engine, weight_digests

pytestmark = pytest.mark.usefixtures("services")

SPARSE: dict[str, Any] = {"num_episode": 2, "save_episode_interval": 4, "keep_last": 4}
"""Training state is kept for the last version only: before it, a resume trains again."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def plain(store: Path, services: str) -> str:
    learn(toy_engine(), store, "plain", **SPARSE)
    return "plain"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_shards_are_buried_and_made_again_to_the_bits_of_an_undisturbed_run(
    store: Path, plain: str
) -> None:
    learn(toy_engine(), store, "damaged", **SPARSE)
    # As if it had died in the training of episode 1, and in the last evaluation.
    forget(
        store,
        "damaged",
        "episodes/episode=000001/trained.json",
        "episodes/episode=000001/scoring/shard-00003.parquet",
        "evaluations/version=000002/*/done.json",
    )
    root = store / "damaged"
    damaged = [
        "episodes/episode=000000/rollout/shard-00000.parquet",  # read to train again
        "episodes/episode=000000/scoring/shard-00001.parquet",
        "episodes/episode=000001/rollout/shard-00001.parquet",  # read to train
        "episodes/episode=000001/scoring/shard-00002.parquet",
        "episodes/episode=000001/rollout/shard-00003.parquet",  # read to score
        *(str(p.relative_to(root)) for p in root.glob("evaluations/version=000002/*/*.parquet")),
    ]
    assert len(damaged) == 7
    for key in damaged:
        flip_a_byte(root / key)
    # And as if the attempt before had died right after it had buried these.
    buried = [
        "episodes/episode=000000/rollout/shard-00002.parquet",
        "episodes/episode=000001/rollout/shard-00000.parquet",
    ]
    for key in buried:
        (root / key.replace(".parquet", ".tombstone.json")).write_text("{}")
    learn(toy_engine(), store, "damaged", **SPARSE)

    assert weight_digests(store, "damaged") == weight_digests(store, plain)
    undisturbed, found = shard_digests(store, plain), shard_digests(store, "damaged")
    again = {key.replace(".parquet", ".g1.parquet"): key for key in [*damaged, *buried]}
    assert set(found) - set(undisturbed) == set(again)
    assert all(found[new] == undisturbed[old] for new, old in again.items())
    for key in damaged:
        assert found[key] != undisturbed[key], "an object, once there, never changes"
        tombstone = json.loads((root / key.replace(".parquet", ".tombstone.json")).read_text())
        assert tombstone["damaged"] == f"damaged/{key}"
        assert "is damaged" in tombstone["cause"]
    assert {k for k in undisturbed if found[k] != undisturbed[k]} == set(damaged)


def test_a_shard_whose_weights_are_gone_cannot_be_made_again_and_says_so(store: Path) -> None:
    settings = {**SPARSE, "num_episode": 3}
    learn(toy_engine(eval_rows=0), store, "gone", **settings)
    forget(store, "gone", "episodes/episode=000002/trained.json")
    flip_a_byte(store / "gone/episodes/episode=000001/rollout/shard-00001.parquet")
    # As if retention had been here.
    (weights,) = (store / "gone/weights/version=000001").iterdir()
    record = store / "gone/deleted/weights/version=000001" / f"{weights.name}.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    with pytest.raises(StoreDamageError, match=r"shard-00001.parquet is damaged.* version 1, from"):
        learn(toy_engine(eval_rows=0), store, "gone", **settings)


def lost_reference() -> Any:
    """A reference to what went with its owner, as when a node goes."""
    import ray

    class Owner:
        def make(self) -> list[Any]:
            return [ray.put("a table")]

    owner = ray.remote(Owner).remote()
    (reference,) = ray.get(owner.make.remote())
    ray.kill(owner)
    for _ in range(200):
        try:
            ray.get(reference, timeout=20)
        except ray.exceptions.ObjectLostError:
            return reference
        time.sleep(0.1)
    raise AssertionError("the reference outlives its owner")


def test_training_reads_from_the_store_what_ray_has_lost(
    store: Path, plain: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    append, lost = StreamDataset.append, lost_reference()

    def lose(stream: StreamDataset, handle: ShardHandle) -> bool:
        if stream.name.startswith("scoring") and handle.ref is not None:
            handle = replace(handle, ref=lost)
        return append(stream, handle)

    monkeypatch.setattr(StreamDataset, "append", lose)
    learn(toy_engine(), store, "lost", **SPARSE)
    assert weight_digests(store, "lost") == weight_digests(store, plain)
    said = [r.getMessage() for r in caplog.records if "it is read from the store" in r.getMessage()]
    assert len(said) >= 2
    assert "an input of step 1 of 2 of training of episode 0" in said[0]
