"""One pass over the rows of a file that is not kept in memory: all that must be known of them.

Types of columns, ids and the digest are learnt together, so that a large file is read once. The
digest is of uniform rows; where a later row brings a column, or makes ints floats, those before it
were digested as something else, and it is made anew in a second pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from rlhf_flows.data.row_sequences import LazyRows, RowIds
from rlhf_flows.data.row_types import ColumnTypes
from rlhf_flows.errors import DataError

__all__ = ["CheckRow", "RowDigest", "Survey", "rows_digest"]

CheckRow = Callable[[Mapping[str, Any], Callable[[], str]], None]
"""Raises DataError for a row that cannot be used; the second argument names it."""


def rows_digest(rows: Sequence[Any], *, parts: Sequence[int] = ()) -> str:
    """SHA-256 of the rows in their order; the same from whichever kind of file they came.

    `parts`: how many of them belong to each of several datasets.
    """
    if not parts and isinstance(rows, LazyRows) and rows.digest:
        return rows.digest
    digest = RowDigest()
    for number, row in enumerate(rows):
        digest.add(row, number)
    return digest.of(parts)


class RowDigest:
    """SHA-256 of rows, which are shown one after another."""

    def __init__(self) -> None:
        self._sha = sha256()

    def add(self, row: Any, number: int) -> None:
        """Raises DataError for what no file could hold."""
        try:
            text = _ENCODER.encode(row)
        except DataError as e:
            raise DataError(f"row {number} of the dataset: {e}") from e
        except (TypeError, ValueError, RecursionError) as e:
            raise DataError(
                f"row {number} of the dataset is nothing that a file could hold ({e}): use text,"
                " numbers, tensors, lists and dicts whose keys are text"
            ) from e
        self._sha.update(text.encode())
        self._sha.update(b"\n")

    def of(self, parts: Sequence[int] = ()) -> str:
        if parts:
            self._sha.update(json.dumps(list(parts)).encode())
        return self._sha.hexdigest()


class Survey:
    """Is shown every row of a file once, in order."""

    def __init__(self, rows: LazyRows, check: CheckRow) -> None:
        """`rows` can name any row that was shown, by `where`."""
        self._rows = rows
        self._check = check
        self._types = ColumnTypes(rows.where)
        self._ids = RowIds()
        self._digest: RowDigest | None = RowDigest()
        self._count = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises DataError for a row that cannot be used."""
        number, types = self._count, self._types
        self._check(row, lambda: self._rows.where(number))
        before = (len(types.names), len(types.floats))
        if types.add(row, number) and number and before != (len(types.names), len(types.floats)):
            self._digest = None
        if "id" in row:
            self._ids.add(row["id"], number, self._rows.where)
        if self._digest is not None:
            self._digest.add(types.uniform(row), number)
        self._count += 1

    def finish(self) -> None:
        """Tells the rows what they are. Raises DataError for what only all of them show."""
        self._types.finish()
        rows = self._rows
        rows.columns, rows.floats = tuple(self._types.names), frozenset(self._types.floats)
        self._ids.check(rows)
        rows.digest = "" if self._digest is None else self._digest.of()
        rows.digest = rows_digest(rows)


def _as_json(value: Any) -> Any:
    """What rows of a program's own may hold beside what a file can."""
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # a tensor or an array
        return {f"{type(value).__name__} {value.dtype}": value.tolist()}
    raise DataError(
        f"it holds a {type(value).__name__}: use text, numbers, tensors, lists and dicts"
    )


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_as_json)
