"""What exists, hence what is missing: from a listing alone."""

from __future__ import annotations

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.store import RunLayout, scan, scan_keys
from rlhf_flows.store.local import LocalStore

LAYOUT = RunLayout("r")
NUM_EPISODES, NUM_SHARDS = 3, 4
PHASES = ("rollout", "scoring")
DIGEST, UID = "d1", "0f"

# Everything a small run can write, by what it is.
PLANS = {(e, w): LAYOUT.plan(e, w) for e in range(NUM_EPISODES) for w in range(2)}
SHARDS = {
    (p, e, i): LAYOUT.shard(p, e, i)
    for p in PHASES
    for e in range(NUM_EPISODES)
    for i in range(NUM_SHARDS)
}
TRAINED = {e: LAYOUT.trained(e) for e in range(NUM_EPISODES)}
ATTEMPTS = {n: LAYOUT.attempt(n) for n in (1, 2)}
EVALUATED = {(v, i): LAYOUT.evaluation_shard(v, DIGEST, i) for v in (0, 2) for i in range(2)}
DONE = {v: LAYOUT.evaluation_done(v, DIGEST) for v in (0, 2)}
FOLDERS = {v: LAYOUT.checkpoint_prefix(v, UID) for v in (1, 2)}
ALL_KEYS = [
    LAYOUT.run_json,
    *(key for part in (PLANS, SHARDS, TRAINED, ATTEMPTS, EVALUATED, DONE) for key in part.values()),
    *(f"{prefix}/model.safetensors" for prefix in FOLDERS.values()),
    *(LAYOUT.deleted(prefix) for prefix in FOLDERS.values()),
]


@given(st.sets(st.sampled_from(ALL_KEYS)), st.randoms())
def test_whatever_was_written_scan_says_exactly_what_is_there_and_what_is_missing(written, rng):
    keys = [*written, "r2/run.json", "r/notes.txt", "r/episodes/episode=000000/plan-00.json.bak"]
    rng.shuffle(keys)
    state = scan_keys("r", keys)

    assert state.exists == (LAYOUT.run_json in written)
    assert state.attempts == tuple(n for n, key in ATTEMPTS.items() if key in written)
    for e in range(NUM_EPISODES):
        episode = state.episode(e)
        assert episode.plans == {w: 0 for w in range(2) if PLANS[e, w] in written}
        assert episode.trained == (TRAINED[e] in written)
        for phase in PHASES:
            there = {i: SHARDS[phase, e, i] for i in range(NUM_SHARDS)}
            there = {i: key for i, key in there.items() if key in written}
            assert getattr(episode, phase) == there
    assert state.trained_episodes == next(
        (e for e in range(NUM_EPISODES) if TRAINED[e] not in written), NUM_EPISODES
    )
    for v in (0, 2):
        shards = {i: EVALUATED[v, i] for i in range(2) if EVALUATED[v, i] in written}
        evaluation = state.evaluations.get((v, DIGEST))
        if evaluation is None:
            assert not shards
            assert DONE[v] not in written
        else:
            assert evaluation.shards == shards
            assert evaluation.done == (DONE[v] in written)
    assert state.deleted == {p for p in FOLDERS.values() if LAYOUT.deleted(p) in written}


generations = st.sets(st.integers(0, 3))


@given(shards=generations, tombstones=generations, rng=st.randoms())
def test_the_newest_generation_counts_unless_its_tombstone_stands(shards, tombstones, rng):
    keys = [LAYOUT.shard("rollout", 0, 7, g) for g in shards]
    keys += [LAYOUT.tombstone("rollout", 0, 7, g) for g in tombstones]
    rng.shuffle(keys)
    episode = scan_keys("r", keys).episode(0)
    newest_damaged = max(tombstones, default=-1)
    if max(shards, default=-1) > newest_damaged:
        assert episode.rollout == {7: LAYOUT.shard("rollout", 0, 7, max(shards))}
    else:
        assert episode.rollout == {}
        # What is written next must count.
        again = [*keys, LAYOUT.shard("rollout", 0, 7, episode.next_generation("rollout", 7))]
        assert scan_keys("r", again).episode(0).rollout == {7: again[-1]}
    assert episode.scoring == {}


@given(shards=generations, tombstones=generations, rng=st.randoms())
def test_generations_count_in_evaluations_as_they_do_in_episodes(shards, tombstones, rng):
    keys = [LAYOUT.evaluation_shard(2, DIGEST, 7, g) for g in shards]
    keys += [LAYOUT.evaluation_tombstone(2, DIGEST, 7, g) for g in tombstones]
    keys += [LAYOUT.evaluation_done(2, DIGEST)]
    rng.shuffle(keys)
    found = scan_keys("r", keys).evaluations[2, DIGEST]
    newest_damaged = max(tombstones, default=-1)
    assert found.next_generation(7) == newest_damaged + 1
    if max(shards, default=-1) > newest_damaged:
        assert found.shards == {7: LAYOUT.evaluation_shard(2, DIGEST, 7, max(shards))}
    else:
        assert found.shards == {}


def test_quarantined_samples_are_listed():
    key = LAYOUT.quarantine(1, "e000001-r000012-s02")
    assert scan_keys("r", [key]).episode(1).quarantined == ("e000001-r000012-s02",)


def test_who_was_quarantined_of_the_prompts_before_is_not_among_the_ones_that_replace_them():
    plans = [LAYOUT.plan(1), LAYOUT.plan(1, generation=1)]
    old = LAYOUT.quarantine(1, "e000001-r000012-s02")
    new = LAYOUT.quarantine(1, "e000001-r000003-s00", 1)
    assert scan_keys("r", [*plans, old]).episode(1).quarantined == ()
    assert scan_keys("r", [*plans, old, new]).episode(1).quarantined == ("e000001-r000003-s00",)
    assert scan_keys("r", [plans[0], old]).episode(1).quarantined == ("e000001-r000012-s02",)


def test_a_scan_sees_what_is_in_the_store_and_of_this_run_only(store):
    for key in (LAYOUT.run_json, SHARDS["rollout", 0, 2], "r2/run.json", "r2/attempts/000001.json"):
        store.put_if_absent(key, b"")
    state = scan(store, "r")
    assert state.exists
    assert state.attempts == ()
    assert list(state.episode(0).rollout) == [2]
    assert not scan(store, "r3").exists


def test_a_scan_of_ten_thousand_shards_takes_less_than_two_seconds(tmp_path):
    keys = [LAYOUT.shard(p, e, i) for p in PHASES for e in range(50) for i in range(100)]
    random.Random(0).shuffle(keys)
    for key in keys:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    start = time.perf_counter()
    state = scan(LocalStore(tmp_path), "r")
    assert time.perf_counter() - start < 2.0
    assert sum(len(getattr(state.episode(e), p)) for p in PHASES for e in range(50)) == 10_000
