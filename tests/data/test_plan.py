from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import EpisodePlan, GroupRef, make_plan, permutation, training_batches
from rlhf_flows.data.plan import sample_seed
from rlhf_flows.errors import ConfigError, DataDamageError

seeds = st.integers(0, 2**63)


def planned(**changes: Any) -> EpisodePlan:
    settings: dict[str, Any] = {
        "run_seed": 7,
        "episode": 0,
        "num_rows": 10,
        "dataset_digest": "d1",
        "sample_per_episode": 24,
        "group_size": 4,
        "groups_per_shard": 2,
        "shuffle": True,
        "versions": {"policy": 0},
    }
    return make_plan(**{**settings, **changes})


@st.composite
def plans(draw: Any) -> EpisodePlan:
    group_size = draw(st.integers(1, 5))
    return planned(
        run_seed=draw(seeds),
        episode=draw(st.integers(0, 50)),
        num_rows=draw(st.integers(1, 12)),
        sample_per_episode=group_size * draw(st.integers(1, 15)),
        group_size=group_size,
        groups_per_shard=draw(st.integers(1, 6)),
        shuffle=draw(st.booleans()),
        versions=draw(st.dictionaries(st.text(), st.integers(0), max_size=2)),
    )


def rows_of(plan: EpisodePlan) -> list[int]:
    return [row for shard in plan.shards for row in shard.rows]


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_row_comes_once_in_each_pass_over_the_dataset(
    run_seed: int, num_rows: int, groups: int, shuffle: bool
) -> None:
    episodes = [
        planned(
            run_seed=run_seed,
            episode=e,
            num_rows=num_rows,
            group_size=1,
            sample_per_episode=groups,
            shuffle=shuffle,
        )
        for e in range(2 * num_rows)
    ]
    rows = list(chain.from_iterable(rows_of(plan) for plan in episodes))
    passes = [rows[i : i + num_rows] for i in range(0, len(rows), num_rows)]
    assert len(rows) == 2 * num_rows * groups
    assert all(sorted(one) == list(range(num_rows)) for one in passes)


def test_passes_over_the_dataset_are_shuffled_differently() -> None:
    first, second = (planned(episode=e, sample_per_episode=40) for e in (0, 1))
    assert sorted(rows_of(first)) == sorted(rows_of(second))
    assert rows_of(first) != rows_of(second)


@given(plans())
def test_sample_ids_and_groups_are_unique_and_complete(plan: EpisodePlan) -> None:
    parts = [plan.samples(shard.index) for shard in plan.shards]
    columns = {name: list(chain.from_iterable(p[name] for p in parts)) for name in parts[0]}
    assert len(set(columns["sample_id"])) == plan.num_samples
    assert Counter(columns["group"]) == dict.fromkeys(range(plan.num_groups), plan.group_size)
    assert columns["sibling"] == list(range(plan.group_size)) * plan.num_groups
    assert all(0 <= seed < 2**31 for seed in columns["seed"])


@given(plans())
def test_a_plan_survives_json_with_the_nonce_of_its_commit(plan: EpisodePlan) -> None:
    text = json.dumps({**plan.to_json(), "nonce": "n"})
    assert EpisodePlan.from_json(json.loads(text)) == plan


@given(plans(), st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_training_batches_hold_every_group_once(
    plan: EpisodePlan, width: int, epoch: int, shuffle: bool
) -> None:
    batches = training_batches(
        plan, samples_per_batch=width * plan.group_size, epoch=epoch, shuffle=shuffle
    )
    everything = [GroupRef(s.index, i) for s in plan.shards for i in range(len(s.rows))]
    assert sorted(chain.from_iterable(batches)) == everything
    assert all(len(batch) == width for batch in batches[:-1])
    again = training_batches(
        EpisodePlan.from_json(plan.to_json()),
        samples_per_batch=width * plan.group_size,
        epoch=epoch,
        shuffle=shuffle,
    )
    assert batches == again


def test_training_passes_are_shuffled_differently_and_in_order_without_shuffle() -> None:
    plan = planned(sample_per_episode=80)
    orders = [
        list(chain(*training_batches(plan, samples_per_batch=8, epoch=e, shuffle=True)))
        for e in range(3)
    ]
    plain = list(chain(*training_batches(plan, samples_per_batch=8, epoch=0, shuffle=False)))
    assert plain == sorted(plain)
    assert len({tuple(order) for order in [*orders, plain]}) == 4


def test_a_plan_is_the_same_on_every_machine() -> None:
    """Written down once: a change here would break the resume of every run that exists."""
    plan = planned(run_seed=1, episode=1, num_rows=5, sample_per_episode=16, group_size=2)
    assert rows_of(plan) == [0, 4, 4, 0, 3, 1, 2, 0]
    assert plan.samples(1)["sample_id"] == [
        "e000001-r000004-s02",
        "e000001-r000004-s03",
        "e000001-r000000-s02",
        "e000001-r000000-s03",
    ]
    assert plan.samples(2)["seed"] == [1848175496, 96796677, 1410922416, 286669352]
    assert permutation(6, 0, "x").tolist() == [2, 4, 3, 5, 0, 1]
    assert training_batches(plan, samples_per_batch=8, epoch=0, shuffle=True)[0] == [
        GroupRef(0, 0),
        GroupRef(0, 1),
        GroupRef(1, 0),
        GroupRef(2, 1),
    ]


def test_seeds_depend_on_run_episode_and_sample() -> None:
    assert len({sample_seed(r, e, s) for r in (0, 1) for e in (0, 1) for s in ("a", "b")}) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_per_episode": 25}, "25 is not a multiple of group_size=4.*use 24 or 28"),
        ({"sample_per_episode": 3}, "use 4$"),
        ({"group_size": 0}, "group_size is 0"),
        ({"groups_per_shard": 0}, "groups_per_shard is 0"),
        ({"num_rows": 0}, "num_rows is 0"),
        ({"episode": -1}, "episode is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**changes)


@pytest.mark.parametrize("samples_per_batch", [0, 3, 6])
def test_a_batch_that_would_split_groups_is_refused(samples_per_batch: int) -> None:
    with pytest.raises(ConfigError, match="cannot hold whole groups of 4"):
        training_batches(planned(), samples_per_batch=samples_per_batch, epoch=0, shuffle=True)


def test_a_payload_that_is_no_plan_is_refused() -> None:
    with pytest.raises(DataDamageError, match="format None"):
        EpisodePlan.from_json({"nonce": "x"})
    with pytest.raises(DataDamageError, match="KeyError: 'shards'"):
        EpisodePlan.from_json({k: v for k, v in planned().to_json().items() if k != "shards"})
