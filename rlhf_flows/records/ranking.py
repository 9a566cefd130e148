"""Samples in the order of a number of theirs."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_flows.errors import DataError
from rlhf_flows.registry import nearest

__all__ = ["ranked"]


def ranked(table: pa.Table, by: str, *, descending: bool) -> pa.Table:
    """The rows that have a number in the column `by`, sorted; equal ones stay as they are.

    Raises DataError, with the nearest name, where it is no column of numbers.
    """
    names = [
        f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)
    ]
    if by not in names:
        raise DataError(
            f"samples cannot be ranked by {by!r}{nearest(by, names)}: columns of numbers are"
            f" {', '.join(names)}"
        )
    values = table[by]
    is_number = pc.is_valid(values)
    if pa.types.is_floating(values.type):
        is_number = pc.and_kleene(is_number, pc.invert(pc.is_nan(values)))
    found = table.filter(is_number)
    keys = pc.negate(found[by].cast(pa.float64())) if descending else found[by]
    order = sorted(range(found.num_rows), key=keys.to_pylist().__getitem__)
    return found.take(pa.array(order, pa.int64()))
