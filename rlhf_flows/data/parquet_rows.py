"""Rows of Parquet files. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_flows.errors import DataError

__all__ = ["parquet_rows"]


def parquet_rows(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its place, from 0. Raises DataError for columns that a row may not hold."""
    import pyarrow as pa  # heavy, and only Parquet needs it
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name} is no Parquet file that can be read: {e}") from e
    for field in table.schema:
        if not _plain_type(pa, field.type):
            raise DataError(
                f"{name}: column {field.name!r} is {field.type}, which a prompt file may not hold: "
                "cast it to text or numbers, or leave it out"
            )
    yield from enumerate(table.to_pylist())


def _plain_type(pa: Any, type: Any) -> bool:
    of = pa.types
    if of.is_struct(type):
        return all(_plain_type(pa, field.type) for field in type)
    if of.is_list(type) or of.is_large_list(type) or of.is_fixed_size_list(type):
        return _plain_type(pa, type.value_type)
    if of.is_dictionary(type):
        return _plain_type(pa, type.value_type)
    return any(
        holds(type)
        for holds in (
            of.is_integer,
            of.is_floating,
            of.is_boolean,
            of.is_string,
            of.is_large_string,
            of.is_string_view,
            of.is_null,
        )
    )
