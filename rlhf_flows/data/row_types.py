"""One type for each column of a prompt file, over all its rows.

The decision here: types are settled for the whole dataset, not shard by shard. A column with ints
in one shard and floats in the next would be two types in the files of one run, and a reader that
takes the first file's (DuckDB does) would cut 0.5 down to 0 without a word. They are learnt row by
row, so that a file need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_flows.errors import DataError

__all__ = ["ColumnTypes", "kind_of", "uniform_row", "uniform_rows"]

_KINDS = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
_EXACT = 2**53
"""Up to here every int is a float, too."""
_MOST_SHAPES = 1024


def uniform_rows(
    rows: Sequence[Mapping[str, Any]], *, where: Callable[[int], str] = "row {}".format
) -> list[dict[str, Any]]:
    """The rows with the same keys in all, None where one was missing, and one type a column.

    Ints in a column with floats become floats. `where` names a row in messages ("row 3").
    Raises DataError for a column of two types, naming a row of each, and for ints beyond 64 bits.
    """
    types = ColumnTypes(where)
    for number, row in enumerate(rows):
        types.add(row, number)
    types.finish()
    return [types.uniform(row) for row in rows]


def uniform_row(
    row: Mapping[str, Any], names: Iterable[str], floats: Iterable[str]
) -> dict[str, Any]:
    """The row with these columns, None where it lacks one; `floats` of them hold no ints."""
    found = {name: row.get(name) for name in names}
    for name in floats:
        value = found[name]
        if type(value) is int:
            found[name] = float(value)
    return found


def kind_of(value: Any) -> str:
    """What a value of a row is, in the words of JSON."""
    if value is None:
        return "null"
    if type(value) in (int, float):
        return "a number"
    return _KINDS.get(type(value), f"a {type(value).__module__}.{type(value).__qualname__}")


class ColumnTypes:
    """What the columns of some rows are; each row is shown once, then any can be made uniform."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self.names: dict[str, None] = {}
        """Of all columns, in the order in which they were first seen."""
        self.floats: set[str] = set()
        """Columns with a number that is no int."""
        self._where = where
        self._kinds: dict[str, tuple[str, int]] = {}
        """What each column holds, and the first row that says so."""
        self._inexact: dict[str, tuple[int, int]] = {}
        """The first int of a column that no float is, and its row."""
        self._shapes: dict[tuple[Any, ...], tuple[str, ...]] = {}
        """Keys and types of rows that were seen, with the keys of their ints."""

    def add(self, row: Mapping[str, Any], number: int) -> bool:
        """Row `number`; whether it says anything new of the columns. Raises DataError."""
        shape = (*row, *map(type, row.values()))
        ints = self._shapes.get(shape)
        is_new = ints is None
        if ints is None:
            ints = self._learn(row, number)
            if len(self._shapes) < _MOST_SHAPES:
                self._shapes[shape] = ints
        for name in ints:
            value = row[name]
            if not -_EXACT <= value <= _EXACT:
                self._check_int(name, value, number)
        return is_new

    def finish(self) -> None:
        """After the last row. Raises DataError for a number that would change as a float."""
        for name, (value, number) in self._inexact.items():
            if name in self.floats:
                raise DataError(
                    f"{self._where(number)}: {name!r} is {value}, and other rows of the column"
                    " have fractions: as a float it would change; write the numbers of this column"
                    " as text"
                )

    def uniform(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with all columns, None where it lacks one, and ints as floats where due."""
        return uniform_row(row, self.names, self.floats)

    def _learn(self, row: Mapping[str, Any], number: int) -> tuple[str, ...]:
        for name, value in row.items():
            self.names.setdefault(name)
            if value is None:
                continue
            kind = kind_of(value)
            first, its_row = self._kinds.setdefault(name, (kind, number))
            if kind != first and name != "prompt":  # a prompt may be text or messages
                raise DataError(
                    f"column {name!r} is {first} in {self._where(its_row)} and {kind} in"
                    f" {self._where(number)}: give the column one type, so that every shard of the"
                    " run has the same"
                )
            if type(value) is float:
                self.floats.add(name)
        return tuple(name for name, value in row.items() if type(value) is int)

    def _check_int(self, name: str, value: int, number: int) -> None:
        if not -(2**63) <= value < 2**63:
            raise DataError(
                f"{self._where(number)}: {name!r} is a number beyond 64 bits, which no column can"
                " hold: write the numbers of this column as text"
            )
        if int(float(value)) != value:
            self._inexact.setdefault(name, (value, number))
