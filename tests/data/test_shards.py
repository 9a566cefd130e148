from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_flows.data import GroupRef, make_plan, planned_batch, select, take_groups
from rlhf_flows.errors import DataError

PLAN = make_plan(
    run_seed=0,
    episode=0,
    num_rows=8,
    dataset_digest="d",
    sample_per_episode=10,
    group_size=2,
    groups_per_shard=2,
    shuffle=True,
    versions={},
)


def shards() -> dict[int, dict[str, Any]]:
    return {shard.index: planned_batch(PLAN, shard.index) for shard in PLAN.shards}


def test_a_planned_batch_has_the_columns_of_the_plan_as_int64() -> None:
    batch = planned_batch(PLAN, 1)
    assert {n: c.dtype for n, c in batch.items() if n != "sample_id"} == dict.fromkeys(
        ["group", "sibling", "prompt_row", "seed"], torch.int64
    )
    assert {n: c if n == "sample_id" else c.tolist() for n, c in batch.items()} == PLAN.samples(1)


def test_take_groups_gives_whole_groups_in_the_order_asked() -> None:
    batch = take_groups(PLAN, shards(), [GroupRef(2, 0), GroupRef(0, 1)])
    assert batch["group"].tolist() == [4, 4, 1, 1]
    assert batch["sibling"].tolist() == [0, 1, 0, 1]


def test_take_groups_leaves_out_a_group_without_rows() -> None:
    given = shards()
    given[0] = select(given[0], [2, 3])  # group 0 was quarantined
    batch = take_groups(PLAN, given, [GroupRef(0, 0), GroupRef(0, 1)])
    assert batch["group"].tolist() == [1, 1]
    assert take_groups(PLAN, given, [GroupRef(0, 0)]) == {}


def test_take_groups_names_a_shard_that_is_not_there() -> None:
    with pytest.raises(DataError, match="wants shard 2, and was given shards 0, 1"):
        take_groups(PLAN, {i: s for i, s in shards().items() if i < 2}, [GroupRef(2, 0)])
