"""Runs that are started again: what is there is kept, what is missing is made, to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.data import Blamed
from rlhf_flows.errors import DataError, StoreDamageError
from rlhf_flows.store import open_store, scan
from tests.end_to_end.whole_run import (
    RUNTIME,
    assert_exactly_once,
    commits,
    evaluated_versions,
    learn,
    shard_digests,
    toy_engine,
    weight_digests,
)

pytestmark = pytest.mark.usefixtures("services")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture(scope="module")
def five(store: Path, services: str) -> str:
    """A run of five episodes in one go."""
    learn(toy_engine(), store, "five", num_episode=5)
    return "five"


def lines_of(log: Path) -> int:
    return len(log.read_text().splitlines())


def forget(store: Path, run: str, *patterns: str) -> None:
    """What a run would be if it had died before it wrote these."""
    for pattern in patterns:
        found = sorted((store / run).glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()


@pytest.mark.slow
def test_a_finished_run_does_nothing_and_more_episodes_with_more_replicas_go_on_from_it(
    store: Path, five: str, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    learn(toy_engine(log=log), store, "grown", num_episode=3)
    calls, shards = lines_of(log), shard_digests(store, "grown")
    again = learn(toy_engine(log=log), store, "grown", num_episode=3)
    assert (again.version, again.resumed_at) == (3, 3)
    assert list(again.episodes) == [0, 1, 2]
    assert list(again.evaluations) == [0, 3]
    assert again.seconds.get("rollout", 0.0) == 0.0
    assert (lines_of(log), shard_digests(store, "grown")) == (calls, shards)

    two = {"policy": {"num_replica": 2}}
    more = learn(toy_engine(log=log), store, "grown", num_episode=5, models=two)
    assert (more.version, more.resumed_at) == (5, 3)
    assert weight_digests(store, "grown") == weight_digests(store, five)
    assert_exactly_once(store, "grown", episodes=5)
    assert evaluated_versions(store, "grown") == [0, 3, 5]
    changed = json.loads((store / "grown/attempts/000003.json").read_text())["changed"]
    assert "models.policy.num_replica" in str(changed)
    assert_only_the_newest_are_kept(store, "grown", kept=(4, 5), deleted=(1, 2, 3))


@pytest.mark.slow
def test_a_run_that_moved_goes_on_to_the_same_bits(
    store: Path, five: str, services: str, tmp_path: Path
) -> None:
    learn(toy_engine(), store, "moved", num_episode=3)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(store / "moved", elsewhere / "moved")
    # Another store, cluster (pools of another making), number of replicas and of ranks.
    models = {"policy": {"num_replica": 2}, "trainer": {"ranks_per_replica": 2}}
    learn(toy_engine(), elsewhere, "moved", address=services, models=models, num_episode=5)
    assert weight_digests(elsewhere, "moved") == weight_digests(store, five)
    assert_exactly_once(elsewhere, "moved", episodes=5)


def assert_only_the_newest_are_kept(
    store: Path, run: str, *, kept: tuple[int, ...], deleted: tuple[int, ...]
) -> None:
    """Weights and training states, those of earlier attempts included; what went is recorded."""

    for kind in ("checkpoints", "weights"):
        for root, versions in ((store / run, kept), (store / run / "deleted", deleted)):
            found = sorted(path.name for path in (root / kind).iterdir() if any(path.iterdir()))
            assert found == [f"version={v:06d}" for v in versions]


@pytest.mark.slow
def test_between_full_checkpoints_a_resume_trains_again_to_the_committed_digests(
    store: Path, five: str, tmp_path: Path
) -> None:
    settings = {"num_episode": 4, "save_episode_interval": 3, "keep_last": 4}
    learn(toy_engine(), store, "sparse", **settings)
    states = [c["checkpoints"]["trainer"]["state"] is not None for c in commits(store, "sparse")]
    assert states == [False, False, True, True]
    # As if it had died right after the second episode.
    forget(store, "sparse", "episodes/episode=00000[23]/*.json", "evaluations/version=000004/*/*")
    learn(toy_engine(), store, "sparse", **settings)
    assert weight_digests(store, "sparse") == weight_digests(store, five)[:4]


@pytest.mark.slow
def test_training_again_that_gives_other_weights_stops_the_run(store: Path, five: str) -> None:
    learn(toy_engine(eval_rows=0), store, "wrong", num_episode=2, save_episode_interval=4)
    forget(store, "wrong", "episodes/episode=000001/trained.json")
    trained = store / "wrong/episodes/episode=000000/trained.json"
    commit = json.loads(trained.read_text())
    commit["checkpoints"]["trainer"]["digest"] = "0" * 64
    trained.write_text(json.dumps(commit))
    with pytest.raises(StoreDamageError, match=r"gave other weights .* than were committed \(0000"):
        learn(toy_engine(eval_rows=0), store, "wrong", num_episode=2, save_episode_interval=4)


@pytest.mark.slow
def test_a_lost_shard_is_made_again_byte_for_byte(store: Path, five: str) -> None:
    learn(toy_engine(), store, "lost", num_episode=3)
    before = shard_digests(store, "lost")
    forget(
        store,
        "lost",
        "episodes/episode=000002/trained.json",
        "episodes/episode=000002/rollout/shard-00001.parquet",
        "episodes/episode=000002/scoring/shard-0000[13].parquet",
    )
    learn(toy_engine(), store, "lost", num_episode=3)
    assert shard_digests(store, "lost") == before
    assert weight_digests(store, "lost") == weight_digests(store, five)[:3]


@pytest.mark.slow
def test_evaluations_that_a_kill_prevented_are_made_up_for(store: Path, five: str) -> None:
    settings: dict[str, Any] = {"max_staleness": 1, "eval_episode_interval": 1, "keep_last": 3}
    learn(toy_engine(), store, "lagging", num_episode=4, **settings)
    shards = shard_digests(store, "lagging")
    forget(
        store,
        "lagging",
        "episodes/episode=000003/trained.json",
        "evaluations/version=00000[34]/*/*",
    )
    learn(toy_engine(), store, "lagging", num_episode=4, **settings)
    assert evaluated_versions(store, "lagging") == [0, 1, 2, 3, 4]
    assert shard_digests(store, "lagging") == shards


def test_what_retention_did_not_come_to_goes_with_the_next_attempt(
    store: Path, services: str
) -> None:
    learn(toy_engine(eval_rows=0), store, "kept", num_episode=2, keep_last=1)
    (record,) = (store / "kept/deleted/weights/version=000001").iterdir()
    record.unlink()
    left = store / "kept/weights/version=000001" / record.stem / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"as if it had been killed right after its last commit")
    learn(toy_engine(eval_rows=0), store, "kept", num_episode=2, keep_last=1)
    assert record.exists()
    assert not left.exists()


@pytest.mark.slow
def test_changed_prompts_are_taken_where_that_is_asked_for(store: Path, services: str) -> None:
    from pandas import read_parquet

    learn(toy_engine(eval_rows=0), store, "fresh", num_episode=2)
    episode = "episodes/episode=000001"
    forget(store, "fresh", f"{episode}/trained.json", f"{episode}/scoring/shard-00003.parquet")
    blamed = Blamed(
        sample_id="e000001-r000002-s00", phase="rollout", module="policy", cause="of old prompts"
    )
    record = store / "fresh" / f"{episode}/quarantine/{blamed.sample_id}.json"
    record.parent.mkdir()
    record.write_text(json.dumps(blamed.to_json()))
    few = toy_engine(eval_rows=0, rows=8)
    learn(few, store, "fresh", num_episode=3, new_prompts="take")
    root = store / "fresh/episodes"
    names = {path.name for path in root.glob("*/plan-*.json")}
    assert names == {"plan-00.json", "plan-00.g1.json"}
    assert [p.parent.name for p in root.glob("*/plan-00.g1.json")] == ["episode=000001"]
    assert len(list(root.glob("episode=000001/*/*.tombstone.json"))) == 7
    state = scan(open_store(store), "fresh").episode(1)
    for keys in (state.rollout, state.scoring):
        frames = [read_parquet(store / key) for key in keys.values()]
        made = [name for frame in frames for name in frame["sample_id"]]
        assert len(made) == len(set(made)) == RUNTIME["sample_per_episode"]
    rows = {int(name.split("-r")[1].split("-")[0]) for name in made}
    assert rows == set(range(8))
    assert [c["rows"]["trained"] for c in commits(store, "fresh")] == [32] * 3
    # They are the run's own from here on.
    learn(few, store, "fresh", num_episode=4)
    with pytest.raises(DataError, match=r"with runtime\.new_prompts=take"):
        learn(toy_engine(eval_rows=0), store, "fresh", num_episode=5)
