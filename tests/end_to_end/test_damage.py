"""Bytes that rot in the store: found by who reads them, named, and made again to the same bits."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.data import from_parquet, select, to_parquet
from rlhf_flows.data.stream import ShardHandle, StreamDataset
from rlhf_flows.engine import Engine, Environment, Trainer
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import StoreDamageError
from tests.end_to_end.processes import generated
from tests.end_to_end.test_resume import forget
from tests.end_to_end.whole_run import learn, shard_digests, toy_engine, weight_digests
from tests.incidents import Incidents
from tests.toys import Rows, ToyPolicy, ToyReward, ToyTrainer

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
    path.write_bytes(flipped(path.read_bytes()))


def flipped(whole: bytes) -> bytes:
    data = bytearray(whole)
    data[len(data) // 3] ^= 1
    return bytes(data)


@pytest.mark.slow
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
    heard = Incidents()
    learn(toy_engine(), store, "damaged", progress=heard, **SPARSE)

    assert {f["shard"] for f in heard.of("shard-repair")} == {f"damaged/{k}" for k in damaged}

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.long
def test_neither_are_shards_of_which_a_tombstone_alone_is_left(store: Path) -> None:
    settings = {**SPARSE, "num_episode": 3}
    learn(toy_engine(eval_rows=0), store, "buried", **settings)
    forget(store, "buried", "episodes/episode=000002/trained.json")
    rollout = store / "buried/episodes/episode=000001/rollout"
    (rollout / "shard-00001.tombstone.json").write_text("{}")
    (weights,) = (store / "buried/weights/version=000001").iterdir()
    record = store / "buried/deleted/weights/version=000001" / f"{weights.name}.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    with pytest.raises(StoreDamageError, match="shard 1 of rollout of episode 1 is not there"):
        learn(toy_engine(eval_rows=0), store, "buried", **settings)
    assert not (rollout / "shard-00001.g1.parquet").exists()


# ---- races that are lost ----------------------------------------------------------------------


class Beaten:
    """Somebody else is faster: when it is first called, these objects appear in the store."""

    def __init__(self, name: str, *, theirs: Mapping[Path, bytes], **options: Any) -> None:
        super().__init__(name, **options)
        self.theirs = dict(theirs)

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        for path, content in self.theirs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(content)
        return super().forward_step(data)  # type: ignore[misc]


class BeatenPolicy(Beaten, ToyPolicy):
    pass


class BeatenReward(Beaten, ToyReward):
    """Comes first in its flow: nothing generates."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Rows:
        return Rows(prompts)

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        digit = data["prompt_row"] % 10
        return {"digit": digit, **super().forward_step({"digit": digit})}


@pytest.fixture(scope="module")
def beaten(store: Path, plain: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a run that adopts three damaged shards, and one of an evaluation that lacks a
    sample.
    """
    evaluation = [
        str(path.relative_to(store / plain))
        for path in sorted((store / plain).glob("evaluations/version=000002/*/*.parquet"))
    ]
    damaged = [*RACES, evaluation[1]]
    theirs = {
        store / "beaten" / key: flipped((store / plain / key).read_bytes()) for key in damaged
    }
    lacking = from_parquet((store / plain / evaluation[0]).read_bytes())
    theirs[store / "beaten" / evaluation[0]] = to_parquet(select(lacking, range(1, 8)))
    log = tmp_path_factory.mktemp("beaten") / "calls"
    policy = BeatenPolicy("policy", theirs=theirs, log=log)
    engine = GRPOEngine(policy, ToyTrainer("trainer"), ToyReward("reward"), name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(16)])
    learn(engine, store, "beaten", **SPARSE)
    return log


RACES = [
    "episodes/episode=000000/rollout/shard-00001.parquet",
    "episodes/episode=000000/scoring/shard-00002.parquet",
]


@pytest.mark.slow
def test_an_adopted_shard_that_is_damaged_is_made_again_and_nothing_else_is(
    store: Path, plain: str, beaten: Path
) -> None:
    undisturbed, found = shard_digests(store, plain), shard_digests(store, "beaten")
    for key in RACES:
        assert (store / "beaten" / key.replace(".parquet", ".tombstone.json")).exists()
        assert found[key.replace(".parquet", ".g1.parquet")] == undisturbed[key]
    assert weight_digests(store, "beaten") == weight_digests(store, plain)
    again = store / "beaten" / RACES[0].replace(".parquet", ".g1.parquet")
    times = Counter(name for name in generated(beaten) if name.startswith("e"))
    twice = [name for name, count in times.items() if count > 1]
    assert sorted(twice) == sorted(from_parquet(again.read_bytes())["sample_id"])


@pytest.mark.long
def test_an_adopted_shard_says_who_is_missing_of_an_evaluation(store: Path, beaten: Path) -> None:
    (folder,) = (store / "beaten/evaluations/version=000002").iterdir()
    done = json.loads((folder / "done.json").read_text())
    assert (folder / "shard-00001.g1.parquet").exists()
    rows = [
        from_parquet((folder / name).read_bytes())
        for name in ("shard-00000.parquet", "shard-00001.g1.parquet")
    ]
    assert done["rows"] == 15
    assert [blamed["sample_id"] for blamed in done["quarantined"]] == ["v000002-r000000-s00"]
    rewards = [float(reward) for batch in rows for reward in batch["reward"]]
    assert done["metrics"]["reward"] == pytest.approx(sum(rewards) / 15)


@pytest.mark.long
def test_a_flow_without_rollout_puts_back_a_damaged_scoring_shard(store: Path) -> None:
    def learn_with(run: str, theirs: Mapping[Path, bytes]) -> None:
        reward, trainer = BeatenReward("reward", theirs=theirs), ToyTrainer("trainer")
        engine = Engine(
            Environment(lambda b: reward.forward_step(b)),
            Trainer(lambda b: trainer.train_step(b)),
            name="offline",
        )
        engine.set_dataset([{"prompt": str(i)} for i in range(64)])
        learn(engine, store, run, num_episode=1)  # type: ignore[arg-type]

    learn_with("offline", {})
    key = "episodes/episode=000000/scoring/shard-00002.parquet"
    damaged = flipped((store / "offline" / key).read_bytes())
    learn_with("offline2", {store / "offline2" / key: damaged})
    again = shard_digests(store, "offline2")[key.replace(".parquet", ".g1.parquet")]
    assert again == shard_digests(store, "offline")[key]
    assert weight_digests(store, "offline2") == weight_digests(store, "offline")
