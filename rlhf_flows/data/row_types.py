"""One type for each column of a prompt file, over all its rows.

The decision here: types are settled for the whole dataset, not shard by shard. A column with ints
in one shard and floats in the next would be two types in the files of one run, and a reader that
takes the first file's (DuckDB does) would cut 0.5 down to 0 without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_flows.errors import DataError

__all__ = ["kind_of", "uniform_rows"]

_KINDS = {bool: "true or false", str: "text", list: "a list", dict: "an object"}


def uniform_rows(
    rows: Sequence[Mapping[str, Any]], *, wheres: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows with the same keys in all, None where one was missing, and one type a column.

    Ints in a column with floats become floats. `wheres` names each row in messages ("row 3").
    Raises DataError for a column of two types, naming a row of each, and for ints beyond 64 bits.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {name: _uniform(name, [row.get(name) for row in rows], wheres) for name in names}
    return [{name: columns[name][i] for name in names} for i in range(len(rows))]


def kind_of(value: Any) -> str:
    """What a value of a row is, in the words of JSON."""
    if value is None:
        return "null"
    if type(value) in (int, float):
        return "a number"
    return _KINDS.get(type(value), f"a {type(value).__module__}.{type(value).__qualname__}")


def _uniform(name: str, values: list[Any], wheres: Sequence[str] | None) -> list[Any]:
    def at(row: int) -> str:
        return wheres[row] if wheres else f"row {row}"

    first_of: dict[str, int] = {}
    floats = False
    for row, value in enumerate(values):
        if value is None:
            continue
        first_of.setdefault(kind_of(value), row)
        floats = floats or type(value) is float
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise DataError(
                f"{at(row)}: {name!r} is a number beyond 64 bits, which no column can hold: "
                "write the numbers of this column as text"
            )
    if name != "prompt" and len(first_of) > 1:  # a prompt may be text or messages
        (one, one_row), (other, other_row) = list(first_of.items())[:2]
        raise DataError(
            f"column {name!r} is {one} in {at(one_row)} and {other} in {at(other_row)}: "
            "give the column one type, so that every shard of the run has the same"
        )
    if not floats:
        return values
    for row, value in enumerate(values):
        if type(value) is int and int(float(value)) != value:
            raise DataError(
                f"{at(row)}: {name!r} is {value}, and other rows of the column have fractions: "
                "as a float it would change; write the numbers of this column as text"
            )
    return [float(value) if type(value) is int else value for value in values]
