from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.data import (
    COLUMNS_VERSION,
    from_arrow,
    from_parquet,
    parquet_metadata,
    select,
    to_arrow,
    to_parquet,
)
from rlhf_flows.data.json_text import from_json_text, to_json_text
from rlhf_flows.errors import DataDamageError, DataError

from .strategies import DTYPES, batches, bits, json_values, tensors

SAMPLES = {
    "sample_id": ["e000000-r000004-s00", "e000000-r000004-s01"],
    "response_ids": [torch.tensor([5, 6, 7]), torch.tensor([8])],
    "behaviour_logprobs": [torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([-0.25])],
    "hidden": torch.tensor([[0.5, 1.0], [1.5, 2.0]], dtype=torch.bfloat16),
    "reward": torch.tensor([0.5, 1.0]),
    "info": [{"steps": [1, 2]}, None],
}


@given(batches())
def test_parquet_gives_back_the_batch_bit_for_bit(batch: dict[str, Any]) -> None:
    assert bits(from_parquet(to_parquet(batch))) == bits(batch)


@given(batches(), st.booleans())
def test_arrow_gives_back_the_batch_bit_for_bit(batch: dict[str, Any], zero_copy: bool) -> None:
    assert bits(from_arrow(to_arrow(batch), zero_copy=zero_copy)) == bits(batch)


@given(json_values)
def test_json_text_gives_back_the_value(value: Any) -> None:
    text = to_json_text(value, where="here")
    assert bits(from_json_text(text)) == bits(value)
    json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity, which is not JSON


def test_json_text_keeps_floats_that_json_has_not() -> None:
    value = {"a": [float("nan"), float("inf"), -float("inf"), -0.0], "é": None}
    text = to_json_text(value, where="here")
    assert bits(from_json_text(text)) == bits(value)
    assert text == ('{"a":[{"$float":"nan"},{"$float":"inf"},{"$float":"-inf"},-0.0],"é":null}')


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: tensors((6,), dtype)), st.integers(0, 6))
def test_a_table_in_pieces_is_the_same_batch(column: torch.Tensor, cut: int) -> None:
    table = to_arrow({"x": column, "r": [column[:i] for i in range(6)], "d": column.reshape(6, 1)})
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    assert bits(from_arrow(pieces)) == bits(from_arrow(table))
    part = from_arrow(table.slice(cut, 3))
    assert bits(part) == bits(select(from_arrow(table), range(cut, min(cut + 3, 6))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_of_a_half_precision_float_survives(dtype: torch.dtype) -> None:
    column = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert bits(from_parquet(to_parquet({"x": column}))["x"]) == bits(column)


@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"])
def test_every_float8_survives(name: str) -> None:
    dtype = getattr(torch, f"float8_{name}")
    column = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    back = from_parquet(to_parquet({"x": column}))["x"]
    assert back.dtype == dtype
    wide, wide_back = column.float(), back.float()
    assert torch.equal(wide.isnan(), wide_back.isnan())
    assert bits(wide.nan_to_num(0.0)) == bits(wide_back.nan_to_num(0.0))


def test_empty_columns_keep_dtype_and_shape() -> None:
    batch = {"a": torch.zeros(0, 3, 0, dtype=torch.bfloat16), "b": [], "c": torch.zeros(0)}
    assert bits(from_parquet(to_parquet(batch))) == bits(batch)
    rows = {"a": torch.zeros(2, 0, 4, dtype=torch.int8), "r": [torch.zeros(0), None]}
    assert bits(from_parquet(to_parquet(rows))) == bits(rows)


def test_tensors_that_are_strided_or_need_gradients_are_stored_by_value() -> None:
    strided = torch.arange(12.0).reshape(3, 4).t()
    learned = torch.ones(4, requires_grad=True)
    back = from_parquet(to_parquet({"x": strided, "w": learned}))
    assert bits(back) == bits({"x": strided.contiguous(), "w": learned.detach()})


def test_equal_batches_give_equal_bytes() -> None:
    assert to_parquet(SAMPLES, metadata={"a": "b"}) == to_parquet(
        dict(SAMPLES), metadata={"a": "b"}
    )


def test_some_columns_can_be_read_in_the_order_asked() -> None:
    data = to_parquet({**SAMPLES, "a": [1, 2], "a.list": [3, 4]})
    assert list(from_parquet(data, ["reward", "sample_id"])) == ["reward", "sample_id"]
    assert from_parquet(data, ["a"]) == {"a": [1, 2]}


def test_a_column_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'rewards' was asked .* did you mean 'reward'"):
        from_parquet(to_parquet(SAMPLES), ["rewards"])


def test_metadata_travels_with_the_file() -> None:
    found = parquet_metadata(to_parquet(SAMPLES, metadata={"policy": "3"}))
    assert found == {"policy": "3", "rlhf_flows.columns_version": str(COLUMNS_VERSION)}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([(1, 2), None], r"'bad', row 0 holds a builtins.tuple: make it a list"),
        ([{"a": [1, {2: 3}]}, None], r"'bad', row 0\['a'\]\[1\] has the key 2 \(int\)"),
        ([{"t": torch.zeros(2)}, 1], r"row 0\['t'\] holds a torch.Tensor: give it a column"),
        ([{"$float": 1}, None], "rename the key"),
        (["ok", "\ud800"], r"'bad', row 1 holds half of a surrogate pair"),
        ([torch.zeros(1), torch.zeros(1, 1)], r"'bad' holds .* \[1, 1\] in row 1"),
        ([torch.zeros(1), torch.zeros(1, dtype=torch.int64)], r"torch.int64 .* in row 1"),
        (torch.zeros(2, dtype=torch.complex64), "complex64, which no column can hold"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_column_and_row(column: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_parquet({"bad": column})


def test_a_column_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="names are strings"):
        to_arrow({"": [1]})


# What is shared, and what is not.


def _address(array: pa.Array) -> int:
    values = array
    while pa.types.is_list(values.type):
        values = values.flatten()
    address: int = values.buffers()[1].address
    return address


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2)], ids=str)
def test_to_arrow_shares_the_memory_of_a_tensor(shape: tuple[int, ...]) -> None:
    column = torch.arange(8.0).reshape(shape)
    assert _address(to_arrow({"x": column})["x"].chunk(0)) == column.data_ptr()


def test_from_arrow_with_zero_copy_shares_the_memory_of_the_table() -> None:
    table = to_arrow(SAMPLES)
    batch = from_arrow(table, zero_copy=True)
    assert batch["reward"].data_ptr() == _address(table["reward"].chunk(0))
    assert batch["behaviour_logprobs"][0].data_ptr() == _address(
        table["behaviour_logprobs"].chunk(0)
    )


def test_writing_to_a_batch_from_arrow_leaves_the_table_as_it_was() -> None:
    table = pa.table({"x": pa.array([1, 2]), "r": pa.array([[1, 2], [3]])})
    batch = from_arrow(table)
    batch["x"].zero_()
    for row in batch["r"]:
        row.zero_()
    assert table.equals(pa.table({"x": pa.array([1, 2]), "r": pa.array([[1, 2], [3]])}))


@given(batches())
def test_writing_to_a_batch_from_parquet_leaves_the_bytes_as_they_were(
    batch: dict[str, Any],
) -> None:
    data = to_parquet(batch)
    kept = bytes(bytearray(data))
    for column in from_parquet(data).values():
        for tensor in column if isinstance(column, list) else [column]:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
    assert data == kept
    assert bits(from_parquet(data)) == bits(batch)


def test_writing_to_one_row_leaves_the_others_as_they_were() -> None:
    rows = from_parquet(to_parquet(SAMPLES))["behaviour_logprobs"]
    rows[0].zero_()
    assert bits(rows[1]) == bits(SAMPLES["behaviour_logprobs"][1])


# Damage.


def test_a_flipped_bit_anywhere_is_found() -> None:
    data = to_parquet(SAMPLES)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        try:
            batch = from_parquet(bytes(damaged))
        except DataDamageError:
            continue
        # Only the magic of the seal itself may go unnoticed: without it a file is like others'.
        assert bits(batch) == bits(SAMPLES), f"byte {position} of {len(data)} changed the samples"
        seal_at = data.index(b"RFSHA256")
        assert seal_at <= position < seal_at + 8


def test_a_file_cut_short_is_found() -> None:
    data = to_parquet(SAMPLES)
    for length in (0, 3, 11, 12, len(data) // 2, len(data) - 1):
        with pytest.raises(DataDamageError):
            from_parquet(data[:length])


def test_a_dtype_of_a_later_version_is_refused() -> None:
    table = to_arrow({"x": torch.zeros(2)})
    later = json.dumps({"kind": "tensor", "dtype": "float128", "shape": []})
    field = table.schema.field("x").with_metadata({"rlhf_flows": later})
    with pytest.raises(DataDamageError, match="dtype 'float128' was found"):
        from_arrow(pa.Table.from_arrays(table.columns, schema=pa.schema([field])))


def test_damage_in_a_file_without_seal_is_an_error_of_ours() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": list(range(100))}), sink, write_page_checksum=True)
    data = bytearray(sink.getvalue().to_pybytes())
    data[200] ^= 0xFF
    with pytest.raises(DataDamageError, match="cannot be read"):
        from_parquet(bytes(data))


# Other readers and writers.


def test_a_file_of_others_becomes_the_nearest_batch() -> None:
    sink = pa.BufferOutputStream()
    table = pa.table(
        {
            "n": pa.array([1, 2], pa.int32()),
            "hole": pa.array([1, None]),
            "ids": pa.array([[1, 2], [3]], pa.large_list(pa.int64())),
            "flag": [True, False],
            "text": ["a", None],
            "chat": [[{"role": "user"}], []],
        }
    )
    pq.write_table(table, sink)
    assert bits(from_parquet(sink.getvalue().to_pybytes())) == bits(
        {
            "n": torch.tensor([1, 2], dtype=torch.int32),
            "hole": [1, None],
            "ids": [torch.tensor([1, 2]), torch.tensor([3])],
            "flag": torch.tensor([True, False]),
            "text": ["a", None],
            "chat": [[{"role": "user"}], []],
        }
    )


def test_token_ids_are_32_bit_in_the_file_where_they_fit() -> None:
    batch = {"a_ids": [torch.tensor([1, 2**31 - 1])], "b_ids": [torch.tensor([2**31])]}
    schema = pq.ParquetFile(pa.BufferReader(to_parquet(batch))).schema_arrow
    assert schema.field("a_ids").type == pa.list_(pa.int32())
    assert schema.field("b_ids").type == pa.list_(pa.int64())


def test_a_shard_is_one_row_group_of_zstd_with_page_checksums() -> None:
    file = pq.ParquetFile(pa.BufferReader(to_parquet(SAMPLES)), page_checksum_verification=True)
    assert file.metadata.num_row_groups == 1
    assert {
        file.metadata.row_group(0).column(i).compression for i in range(file.metadata.num_columns)
    } == {"ZSTD"}
    assert file.read().num_rows == 2
