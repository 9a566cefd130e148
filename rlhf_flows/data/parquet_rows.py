"""Rows of Parquet files. No torch.

The decision here: of a large file whole row groups are read, and a few of them kept; in which order
rows are asked for decides what that costs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from rlhf_flows.data.row_files import RowFile
from rlhf_flows.data.row_sequences import LazyRows
from rlhf_flows.data.row_survey import CheckRow, Survey
from rlhf_flows.errors import DataError

__all__ = ["ParquetRows", "parquet_rows"]

_KEPT_BYTES = 4 << 20
"""Of row groups; one is kept in any case. Rows in order need no more, and of rows in any order too
few would be found in what could be kept of a large file."""
_BATCH_ROWS = 256
_STREAM_BYTES = 1 << 20


class ParquetRows(LazyRows):
    """Rows of a Parquet file, by row groups."""

    def __init__(self, file: RowFile) -> None:
        """Raises DataError for what is no Parquet file, or columns that a row may not hold."""
        super().__init__(file)
        self._open: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()
        parquet = self._parquet()
        _check_schema(file.name, parquet.schema_arrow)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self.num_bytes = sum(group.total_byte_size for group in groups)

    def survey(self, check: CheckRow) -> None:
        """Reads every row, once. Raises DataError naming file and row."""
        survey = Survey(self, check)
        with _readable(self.file.name):
            for batch in self._parquet().iter_batches(_BATCH_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    survey.add(row)
        survey.finish()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Mapping[str, Any]:
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        found: dict[str, Any] = self._group(group).slice(index - start, 1).to_pylist()[0]
        return found

    def where(self, index: int) -> str:
        return f"{self.file.name}, row {index}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_groups": OrderedDict()}

    def _group(self, number: int) -> Any:
        groups = self._groups
        if number not in groups:
            with _readable(self.file.name):
                groups[number] = self._parquet().read_row_group(number, use_threads=False)
            while len(groups) > 1 and sum(g.nbytes for g in groups.values()) > _KEPT_BYTES:
                groups.popitem(last=False)
        groups.move_to_end(number)
        return groups[number]

    def _parquet(self) -> Any:
        if self._open is None:
            import pyarrow.parquet as pq  # heavy, and only Parquet needs it

            with _readable(self.file.name):
                self._open = pq.ParquetFile(
                    self.file.open(), pre_buffer=False, buffer_size=_STREAM_BYTES
                )
        return self._open


def parquet_rows(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its place, from 0. Raises DataError for columns that a row may not hold."""
    import pyarrow as pa  # heavy, and only Parquet needs it
    import pyarrow.parquet as pq

    with _readable(name):
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    _check_schema(name, table.schema)
    yield from enumerate(table.to_pylist())


@contextmanager
def _readable(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name} is no Parquet file that can be read: {e}") from e


def _check_schema(name: str, schema: Any) -> None:
    import pyarrow as pa

    for field in schema:
        if not _plain_type(pa, field.type):
            raise DataError(
                f"{name}: column {field.name!r} is {field.type}, which a prompt file may not hold: "
                "cast it to text or numbers, or leave it out"
            )


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
