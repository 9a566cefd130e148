from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import batch_size, collate, concat, select, to_samples
from rlhf_flows.errors import DataError

from .strategies import batches, bits

scalars = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.text()


def test_batch_size_names_the_column_whose_length_differs() -> None:
    with pytest.raises(DataError, match=r"'reward' has 3 rows, but 'prompt' has 2"):
        batch_size({"prompt": ["a", "b"], "reward": torch.zeros(3)})


def test_batch_size_refuses_what_is_no_column() -> None:
    with pytest.raises(DataError, match="without dimensions"):
        batch_size({"loss": torch.tensor(1.0)})
    with pytest.raises(DataError, match="is a tuple"):
        batch_size({"x": (1, 2)})


def test_a_batch_without_columns_has_no_rows() -> None:
    assert batch_size({}) == 0


def test_select_keeps_the_order_asked_and_may_repeat_a_row() -> None:
    batch = {"x": torch.tensor([10, 20, 30]), "s": ["a", "b", "c"]}
    assert bits(select(batch, [2, 0, 2])) == bits(
        {"x": torch.tensor([30, 10, 30]), "s": ["c", "a", "c"]}
    )
    assert bits(select(batch, torch.tensor([1]))) == bits({"x": torch.tensor([20]), "s": ["b"]})


def test_select_refuses_a_row_that_is_not_there() -> None:
    with pytest.raises(DataError, match="row 3 was asked of a batch of 3 rows"):
        select({"x": [1, 2, 3]}, [3])
    with pytest.raises(DataError, match="by a mask"):
        select({"x": [1, 2]}, torch.tensor([True, False]))


@given(batches(), st.data())
def test_concat_of_the_parts_is_the_whole(batch: dict[str, Any], data: Any) -> None:
    size = batch_size(batch)
    cut = data.draw(st.integers(0, size))
    whole = concat([select(batch, range(cut)), select(batch, range(cut, size))])
    assert bits(whole) == bits(batch)


def test_concat_joins_rows_that_happen_to_be_of_equal_length_with_ragged_ones() -> None:
    dense = {"ids": torch.tensor([[1, 2], [3, 4]])}
    ragged = {"ids": [torch.tensor([5]), torch.tensor([6, 7, 8])]}
    wider = {"ids": torch.tensor([[9, 9, 9]])}
    joined = concat([dense, ragged, wider])["ids"]
    assert [row.tolist() for row in joined] == [[1, 2], [3, 4], [5], [6, 7, 8], [9, 9, 9]]
    assert [row.tolist() for row in concat([dense, wider])["ids"]] == [[1, 2], [3, 4], [9, 9, 9]]


def test_concat_of_plain_values_is_the_same_as_collating_them_at_once() -> None:
    ints, floats, holes = [{"a": 1}], [{"a": 0.5}], [{"a": None}]
    for rows in ([ints, floats], [ints, holes], [floats, holes, ints]):
        joined = concat([collate(part) for part in rows])
        assert bits(joined) == bits(collate([row for part in rows for row in part]))


def test_concat_refuses_two_dtypes_in_one_column() -> None:
    with pytest.raises(DataError, match=r"'reward' cannot be joined from float32.*bfloat16"):
        concat([{"reward": torch.zeros(1)}, {"reward": torch.zeros(1, dtype=torch.bfloat16)}])


def test_concat_refuses_batches_with_other_columns() -> None:
    with pytest.raises(DataError, match="batch 1 of 2 lacks the column 'b'"):
        concat([{"a": [1], "b": [1]}, {"a": [1]}])


def test_collate_stacks_equal_shapes_and_keeps_ragged_rows() -> None:
    batch = collate(
        [
            {"ids": torch.tensor([1, 2]), "image": torch.zeros(2, 3), "mask": np.array([True])},
            {"ids": torch.tensor([3]), "image": torch.ones(2, 3), "mask": np.array([False])},
        ]
    )
    assert [row.tolist() for row in batch["ids"]] == [[1, 2], [3]]
    assert batch["image"].shape == (2, 2, 3)
    assert bits(batch["mask"]) == bits(torch.tensor([[True], [False]]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], torch.tensor([1, 2])),
        ([1.5, 2.5], torch.tensor([1.5, 2.5], dtype=torch.float64)),
        ([1, 0.5], torch.tensor([1.0, 0.5], dtype=torch.float64)),
        ([True, False], torch.tensor([True, False])),
        ([np.float32(0.5), np.int64(1)], torch.tensor([0.5, 1.0], dtype=torch.float64)),
        ([True, 1], [True, 1]),
        ([2**63, 1], [2**63, 1]),
        (["a", None], ["a", None]),
        ([{"k": 1}, {}], [{"k": 1}, {}]),
    ],
)
def test_collate_of_plain_values(values: list[Any], expected: Any) -> None:
    assert bits(collate([{"v": v} for v in values])["v"]) == bits(expected)


def test_collate_names_the_key_and_the_sample_at_fault() -> None:
    good = {"ids": torch.tensor([1, 2]), "answer": "4"}
    with pytest.raises(DataError, match="sample 1 of 2 lacks the key 'answer'"):
        collate([good, {"ids": torch.tensor([1, 2])}])
    with pytest.raises(DataError, match=r"'ids' is torch\.float32 in sample 1"):
        collate([good, {"ids": torch.tensor([0.5]), "answer": ""}])
    with pytest.raises(DataError, match=r"'ids' has shape \[1, 2\] in sample 1"):
        collate([good, {"ids": torch.tensor([[1, 2]]), "answer": ""}])


@given(st.integers(1, 4), st.data())
def test_collate_is_the_inverse_of_to_samples(size: int, data: Any) -> None:
    kinds = [st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(), st.none()]
    kind = data.draw(st.sampled_from(kinds))
    samples = [{"v": value} for value in data.draw(st.lists(kind, min_size=size, max_size=size))]
    assert bits(to_samples(collate(samples))) == bits(samples)


def test_to_samples_gives_python_scalars_and_rows_of_tensors() -> None:
    [first, _] = to_samples({"reward": torch.tensor([0.5, 1.0]), "x": torch.eye(2), "s": ["a", ""]})
    assert type(first["reward"]) is float
    assert bits(first["x"]) == bits(torch.tensor([1.0, 0.0]))
    assert first["s"] == "a"
