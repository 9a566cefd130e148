"""A step of a module on some columns of a batch, under the names that the module knows them by.

How a graph of calls (`rlhf_flows.calls`) asks its modules: each sees the columns that its call
names, and those that say who a sample is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rlhf_flows.data.columns import COLUMNS
from rlhf_flows.errors import DataError

if TYPE_CHECKING:
    from rlhf_flows.data.batch import Batch

__all__ = ["call_by_keys"]

_ALWAYS = (*(c.name for c in COLUMNS if c.phase == "plan"), "policy_version")
"""What every step is given: who a sample is, and the seed that it is drawn with."""


def call_by_keys(
    step: Callable[[Batch], Batch],
    name: str,
    data: Batch,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    known_as: Mapping[str, str],
    gives: Mapping[str, str],
) -> Batch:
    """`step`, a method of module `name`, on the columns `inputs`; of what it gives, `outputs`.

    Args:
        known_as: the name by which the module knows an input, where it is another one.
        gives: the name by which the module gives an output, where it is another one.

    Raises:
        DataError: an input is not in the batch, or an output not among what came back.
    """
    for column in inputs:
        if column not in data:
            raise DataError(
                f"the call of {name!r} needs {column!r}, which no call before it gives and no row"
                f" has{_near(column, data)}: the columns are {', '.join(sorted(data))}"
            )
    given = {column: data[column] for column in _ALWAYS if column in data}
    given |= {known_as.get(column, column): data[column] for column in inputs}
    found = step(given)
    if not isinstance(found, Mapping):
        raise DataError(
            f"{step.__name__} of module {name!r} returned a {type(found).__name__}, expected a dict"
            " of columns"
        )
    for column in outputs:
        own = gives.get(column, column)
        if own not in found:
            raise DataError(
                f"{step.__name__} of module {name!r} was to give {own!r}, and gave"
                f" {', '.join(sorted(found.keys() - given.keys())) or 'nothing new'}: return it, or"
                " leave it out of the call's outputs"
            )
    return {column: found[gives.get(column, column)] for column in outputs}


def _near(name: str, data: Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(data), n=1)
    return f" (nearest: {near[0]!r})" if near else ""
