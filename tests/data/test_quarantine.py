"""What is left out of an episode, and that nothing else moves for it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import (
    Blamed,
    EpisodePlan,
    GroupRef,
    Quarantine,
    align,
    keep_samples,
    make_plan,
    select,
    training_batches,
)
from rlhf_flows.errors import DataDamageError

SIZE = 2


def planned(groups: int = 7, per_shard: int = 2) -> EpisodePlan:
    return make_plan(
        run_seed=3,
        episode=4,
        num_rows=5,  # fewer than groups: a row is asked twice
        dataset_digest="d",
        sample_per_episode=groups * SIZE,
        group_size=SIZE,
        groups_per_shard=per_shard,
        shuffle=True,
        versions={},
    )


def blamed(name: str, phase: str = "rollout") -> Blamed:
    return Blamed(sample_id=name, phase=phase, module="policy", cause="died")


@st.composite
def quarantines(draw: Any) -> tuple[EpisodePlan, Quarantine]:
    plan = planned(draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    names = [n for s in plan.shards for group in plan.groups(s.index) for n in group]
    chosen = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(["rollout", "scoring"])))
    return plan, Quarantine(plan, [blamed(n, phase) for n, phase in chosen.items()])


def test_the_groups_of_a_plan_are_its_samples_in_order() -> None:
    plan = planned()
    for shard in plan.shards:
        ids = list(chain.from_iterable(plan.groups(shard.index)))
        assert ids == plan.samples(shard.index)["sample_id"]


def test_a_blamed_sample_takes_its_group_with_it_from_its_phase_on() -> None:
    plan = planned()
    first, second = plan.groups(1)
    found = Quarantine(plan, [blamed(second[1], "scoring")])
    assert found.kept("rollout", 1) == (first, second)
    assert found.kept("scoring", 1) == (first,)
    assert found.siblings(second[1]) == second
    assert found.left_out([0, 1]) == set(second)
    assert found.left_out([0, 2]) == set()
    assert found.num_left_out() == SIZE
    found.add(blamed(first[0], "rollout"))
    assert found.kept("rollout", 1) == (second,)
    assert found.kept("scoring", 1) == ()
    assert [b.sample_id for b in found.blamed] == sorted([first[0], second[1]])


@given(quarantines(), st.integers(1, 3), st.integers(0, 2))
def test_batches_name_the_rows_that_are_left_where_they_lie_in_the_scored_shard(
    given_: tuple[EpisodePlan, Quarantine], width: int, epoch: int
) -> None:
    plan, quarantine = given_
    scored = {
        s.index: keep_samples(
            {"sample_id": plan.samples(s.index)["sample_id"]},
            {n for group in quarantine.kept("scoring", s.index) for n in group},
        )
        for s in plan.shards
    }
    batches = training_batches(plan, samples_per_batch=width * SIZE, epoch=epoch, shuffle=True)
    trained = []
    for batch in batches:
        rows = quarantine.rows(batch)
        ids = [scored[shard]["sample_id"][row] for shard, some in rows for row in some]
        # The groups of the planned batch in their order, less those that are left out.
        wanted = [
            name
            for ref in batch
            if ref not in quarantine.groups()
            for name in plan.groups(ref.shard)[ref.index]
        ]
        assert ids == wanted
        trained += ids
    assert len(trained) == len(set(trained)) == plan.num_samples - quarantine.num_left_out()


def test_a_batch_does_not_depend_on_who_is_blamed_in_shards_of_another() -> None:
    plan = planned(8, 2)
    batches = training_batches(plan, samples_per_batch=4, epoch=0, shuffle=False)
    before = Quarantine(plan).rows(batches[0])
    assert Quarantine(plan, [blamed(plan.groups(3)[0][0])]).rows(batches[0]) == before
    everything = Quarantine(plan, [blamed(group[0]) for group in plan.groups(0)])
    assert everything.rows(batches[0]) == []
    assert everything.rows([GroupRef(1, 1)]) == [(1, (2, 3))]


def test_a_record_survives_json_and_one_of_another_plan_is_refused() -> None:
    plan = planned()
    record = blamed(plan.groups(0)[0][0])
    assert Blamed.from_json({**record.to_json(), "nonce": "n", "attempt": 3}) == record
    with pytest.raises(DataDamageError, match="lacks 'sample_id'"):
        Blamed.from_json({"nonce": "n"})
    with pytest.raises(DataDamageError, match="names the sample e000004-r000077-s00"):
        Quarantine(plan, [blamed("e000004-r000077-s00")])


# ---- tables of one shard ----------------------------------------------------------------------


def test_tables_are_aligned_by_sample_whichever_is_shorter() -> None:
    sampled = {"sample_id": ["a", "b", "c"], "digit": torch.arange(3)}
    scored = {"sample_id": ["c", "a"], "reward": torch.tensor([2.0, 0.0])}
    for tables in ([sampled, scored], [scored, sampled]):
        by_name = {name: table for table in align(tables) for name in table}
        assert by_name["digit"]["sample_id"] == by_name["reward"]["sample_id"]
        assert by_name["digit"]["digit"].tolist() == by_name["reward"]["reward"].tolist()
    assert align([sampled, scored])[0]["sample_id"] == ["a", "c"]


def test_tables_of_equal_rows_are_not_touched() -> None:
    first = {"sample_id": ["a", "b"], "digit": torch.arange(2)}
    second = {"reward": torch.zeros(2)}
    assert align([first, second]) == [first, second]
    assert align([first])[0] is first
    assert align([]) == []


def test_samples_are_kept_and_left_out_by_id() -> None:
    batch = {"sample_id": ["a", "b", "c"], "digit": torch.arange(3)}
    assert keep_samples(batch, {"c", "a", "x"})["digit"].tolist() == [0, 2]
    assert keep_samples(batch, but={"a"})["sample_id"] == ["b", "c"]
    assert keep_samples(batch) is batch
    assert keep_samples(batch, {"a", "b", "c"}) is batch
    assert keep_samples(select(batch, []), {"a"})["digit"].tolist() == []
