"""Rows as sequences: of a file that was read, of a file that is read when asked, of several.

The decision here: a row knows where it came from (`where_of`), so that whoever finds a mistake in
it can name file and line, long after the file was read.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, overload

import numpy as np

from rlhf_flows.data.row_files import RowFile
from rlhf_flows.data.row_types import uniform_row
from rlhf_flows.errors import DataError

__all__ = [
    "JoinedRows",
    "LazyRows",
    "LoadedRows",
    "RowIds",
    "check_ids",
    "columns_of",
    "indices_to_check",
    "open_here",
    "where_of",
]

Row = Mapping[str, Any]


def where_of(rows: Sequence[Any], index: int) -> str:
    """How messages name a row: "prompts.jsonl, line 3", or "row 2" where it is of no file."""
    where = getattr(rows, "where", None)
    return f"row {index}" if where is None else str(where(index))


def columns_of(rows: Sequence[Any]) -> tuple[str, ...] | None:
    """Of rows that are read when asked for: they are uniform, and too many to be copied or looked
    at more often than needed. None of all others.
    """
    found: tuple[str, ...] | None = getattr(rows, "columns", None)
    return found


def indices_to_check(rows: Sequence[Any], size: int) -> Iterable[int]:
    """Which of the `size` items that were made of the rows are tokenized before anything starts.

    All of them; of a file that is read when asked for, whose lines were all looked at once, as many
    as a minute allows, spread over the whole of it.
    """
    if columns_of(rows) is None or size <= _MOST_CHECKED:
        return range(size)
    return (i * (size - 1) // (_MOST_CHECKED - 1) for i in range(_MOST_CHECKED))


_MOST_CHECKED = 10_000


class LoadedRows(list[dict[str, Any]]):
    """A list of the rows of a file."""

    def __init__(
        self, rows: Iterable[dict[str, Any]], *, name: str, unit: str, numbers: array[int]
    ) -> None:
        """`unit`: what the file has for a row, line or row; `numbers`: which of them each is."""
        super().__init__(rows)
        self.name, self.unit, self.numbers = name, unit, numbers

    def where(self, index: int) -> str:
        return f"{self.name}, {self.unit} {self.numbers[index]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (list(self), self.name, self.unit, self.numbers)


def _loaded(rows: list[dict[str, Any]], name: str, unit: str, numbers: array[int]) -> LoadedRows:
    return LoadedRows(rows, name=name, unit=unit, numbers=numbers)


class LazyRows(Sequence[dict[str, Any]]):
    """Rows that are read from their file when they are asked for. They were checked once, all of
    them are uniform, and they travel to other processes by the file's name.
    """

    columns: tuple[str, ...] = ()
    """Of every row."""
    floats: frozenset[str] = frozenset()
    """Columns in which no number is an int."""
    digest: str = ""
    """What `rows_digest` says of them."""

    def __init__(self, file: RowFile) -> None:
        self.file = file

    @abstractmethod
    def row(self, index: int) -> Mapping[str, Any]:
        """Row `index`, as it stands in the file, from 0. Raises DataError where the file is not
        what it was.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Names the row in messages."""

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Chosen(self, range(*index.indices(len(self))))
        return uniform_row(self.row(range(len(self))[index]), self.columns, self.floats)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.file.name!r}, {len(self)} rows)"


def open_here(rows: Sequence[Any]) -> None:
    """Raises DataError where the files of lazy rows cannot be read on this machine."""
    for part in rows.parts if isinstance(rows, JoinedRows) else (rows,):
        if isinstance(part, LazyRows):
            part.file.open_here()


class _Chosen(Sequence[Any]):
    """Some rows of others, which are not copied."""

    def __init__(self, rows: Sequence[Any], chosen: range) -> None:
        self._rows, self._chosen = rows, chosen
        self.columns = columns_of(rows)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Chosen(self._rows, self._chosen[index])
        return self._rows[self._chosen[index]]

    def where(self, index: int) -> str:
        return where_of(self._rows, self._chosen[index])


class JoinedRows(Sequence[Any]):
    """Several sequences of rows, one after another."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))
        names = {columns_of(part) for part in self.parts}
        self.columns = names.pop() if len(names) == 1 else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Chosen(self, range(*index.indices(len(self))))
        number, place = self._place(range(len(self))[index])
        return self.parts[number][place]

    def where(self, index: int) -> str:
        number, place = self._place(index)
        return where_of(self.parts[number], place)

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


class RowIds:
    """The ids of rows, eight bytes for each: none may come twice."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._rows = array("q")

    def add(self, value: Any, number: int, where: Callable[[int], str]) -> None:
        """Raises DataError for an id that is no text and no number."""
        if value is None:
            return
        if type(value) not in (str, int, float):
            raise DataError(
                f"{where(number)}: the id is a {type(value).__name__}: give text or a number,"
                " each row another"
            )
        self._hashes.append(hash(value))
        self._rows.append(number)

    def check(self, rows: Sequence[Row]) -> None:
        """Raises DataError naming both rows for the first id that came before."""
        hashes = np.array(self._hashes, dtype=np.int64)
        hashes.sort()
        if not len(hashes) or (hashes[1:] != hashes[:-1]).all():
            return
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        found = np.isin(np.frombuffer(self._hashes, dtype=np.int64), twice)
        first_of: dict[Any, int] = {}
        for number in np.frombuffer(self._rows, dtype=np.int64)[found].tolist():
            value = rows[number]["id"]
            first = first_of.setdefault(value, number)
            if first != number:
                raise DataError(
                    f"{where_of(rows, number)} has the id {value!r} of {where_of(rows, first)}: an"
                    " id names one row, so give each another, or leave the column out"
                )


def check_ids(rows: Sequence[Any]) -> None:
    """Raises DataError where two rows have one `id`, or one is neither text nor a number."""
    ids = RowIds()
    for number, row in enumerate(_mappings(rows)):
        ids.add(row.get("id"), number, partial(where_of, rows))
    ids.check(rows)


def _mappings(rows: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        yield row if isinstance(row, Mapping) else {}
