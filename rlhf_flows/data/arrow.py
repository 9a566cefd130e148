"""Batches as Arrow tables and as Parquet files, and back, with nothing lost.

The decision here: files are for readers that know nothing of us, so every column has the type that
pandas and DuckDB expect (numbers, lists of numbers, text), and what that type cannot say (bf16, the
shape of [B, 0, 3], a nested dict) stands in the metadata of its field. A reader without the
metadata sees sensible columns, we get the same batch.

| column of a batch | column of a table |
|---|---|
| Tensor [B] | numbers; bf16 and float8 as the float32 of equal value |
| Tensor [B, ...] | lists (of lists) of numbers |
| list of 1-D tensors, None | lists of numbers; in Parquet, int64 `*_ids` as int32 where they fit |
| list of str, bytes, int, float or bool, each with None | the same |
| any other list | JSON text |

Zero-copy: `to_arrow` shares the memory of contiguous numeric tensors; `from_arrow` copies unless
the caller gives the table away, because a tensor cannot be read-only and would let user code write
into an Arrow buffer that others hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlhf_flows.data.batch import Batch, batch_size
from rlhf_flows.data.column_codec import decode, encode, guess
from rlhf_flows.data.columns import COLUMNS_VERSION
from rlhf_flows.data.sealing import check_seal, seal
from rlhf_flows.errors import DataDamageError, DataError

__all__ = [
    "from_arrow",
    "from_parquet",
    "parquet_metadata",
    "table_from_parquet",
    "to_arrow",
    "to_parquet",
]

_FIELD_KEY = b"rlhf_flows"
_VERSION_KEY = "rlhf_flows.columns_version"


def to_arrow(batch: Mapping[str, Any]) -> pa.Table:
    """A table with one row for each sample. Contiguous numeric tensors on CPU are not copied, so
    the table is valid as long as they are not written to.

    Raises DataError naming the column, and the row where one is at fault.
    """
    batch_size(batch)
    arrays, fields = [], []
    for name, column in batch.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"{name!r} names a column: names are strings that are not empty")
        array, says = encode(name, column)
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata={_FIELD_KEY: json.dumps(says)}))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def from_arrow(table: pa.Table, *, zero_copy: bool = False) -> Batch:
    """The batch that `to_arrow` was given; of a foreign table, the nearest there is.

    With `zero_copy` numeric columns are views of the table's memory, and writable: only for a
    table that nobody else reads.
    """
    batch: Batch = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        text = (field.metadata or {}).get(_FIELD_KEY)
        says = json.loads(text) if text else guess(array)
        batch[field.name] = decode(array, says, zero_copy=zero_copy)
    return batch


def to_parquet(
    batch: Mapping[str, Any] | pa.Table, *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A whole Parquet file: zstd, one row group, page checksums, sealed (sealing.py).

    Equal batches give equal bytes; a table of `to_arrow` gives those of its batch. `metadata` goes
    into the file, see `parquet_metadata`.
    """
    table = _narrow_ids(batch if isinstance(batch, pa.Table) else to_arrow(batch))
    table = table.replace_schema_metadata({**(metadata or {}), _VERSION_KEY: str(COLUMNS_VERSION)})
    leaves = [_leaf(field) for field in table.schema]
    # float16 is left out: DuckDB does not read it byte-stream-split.
    splittable = (pa.float32(), pa.float64(), pa.int32())
    split = [path for path, type in leaves if type in splittable]
    texts = [path for path, type in leaves if type == pa.string()]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression="zstd",
        compression_level=1,
        use_dictionary=texts or False,
        use_byte_stream_split=split or False,
        write_page_checksum=True,
    )
    return seal(memoryview(sink.getvalue()))


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> Batch:
    """The batch that `to_parquet` was given, or only some of its columns, in that order.

    Nothing is shared with `data`: the tensors may be written to. Raises DataDamageError for bytes
    that are not what was written, DataError for a column that is not there.
    """
    file = _open(data)
    names = file.schema_arrow.names
    for name in columns or ():
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise DataError(f"column {name!r} was asked of a shard that lacks it: {hint}")
    try:
        table = file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as e:
        raise DataDamageError(f"a Parquet file of {len(data)} bytes cannot be read: {e}") from e
    if columns is not None:
        table = table.select(list(columns))
    # Pages are decoded into memory of their own, and the table goes no further than here.
    return from_arrow(table, zero_copy=True)


def table_from_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table as any reader sees it, without what the metadata says to us; of `columns`, those
    that the file has, in its order.

    Raises DataDamageError for bytes that are not what was written.
    """
    file = _open(data)
    names = [n for n in file.schema_arrow.names if columns is None or n in columns]
    try:
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as e:
        raise DataDamageError(f"a Parquet file of {len(data)} bytes cannot be read: {e}") from e
    return table.cast(pa.schema([pa.field(f.name, f.type) for f in table.schema]))


def parquet_metadata(data: bytes) -> dict[str, str]:
    """The metadata given to `to_parquet`, and `rlhf_flows.columns_version`."""
    found = _open(data).schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def _open(data: bytes) -> pq.ParquetFile:
    sealed = check_seal(data)
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=not sealed)
    except (pa.ArrowException, OSError) as e:
        raise DataDamageError(f"a Parquet file of {len(data)} bytes cannot be read: {e}") from e


def _narrow_ids(table: pa.Table) -> pa.Table:
    """Token ids as int32: half the memory of a reader, and smaller files. By name, not by value
    alone, so that the files of a run do not differ in type."""
    for index, field in enumerate(table.schema):
        if field.name.endswith("_ids") and field.type == pa.list_(pa.int64()):
            low_high = pc.min_max(table.column(index).combine_chunks().flatten()).as_py()
            low, high = low_high["min"] or 0, low_high["max"] or 0
            if low >= -(2**31) and high < 2**31:
                narrow = pa.list_(pa.int32())
                column = table.column(index).cast(narrow)
                table = table.set_column(index, field.with_type(narrow), column)
    return table


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """Parquet's name of the column that holds the numbers, and their type."""
    path, type = field.name, field.type
    while pa.types.is_list(type):
        path, type = f"{path}.list.element", type.value_type
    return path, type
