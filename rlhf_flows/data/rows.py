"""Rows of a prompt file: JSON lines, a JSON list, or Parquet. No torch.

The decision here: all of a file is checked before anything starts, as a mistake in the last line
should not cost a night. A small one is then a list; of a large one only an index is kept, its rows
are read when they are asked for, and workers read them themselves.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_flows.data.json_rows import JsonlRows, json_rows, jsonl_rows
from rlhf_flows.data.parquet_rows import ParquetRows, parquet_rows
from rlhf_flows.data.row_files import RowFile, read_file
from rlhf_flows.data.row_sequences import LazyRows, LoadedRows, check_ids
from rlhf_flows.data.row_survey import rows_digest
from rlhf_flows.data.row_types import kind_of, uniform_rows
from rlhf_flows.errors import DataError

__all__ = ["check_prompt", "load_rows", "near_name", "rows_digest"]

IN_MEMORY_BYTES = 32 << 20
"""Larger files are read row by row."""
_MOST_SURVEYED = 4
_surveyed: dict[tuple[str, tuple[str, ...]], tuple[tuple[int, int], LazyRows]] = {}
"""What was learnt of large files, as a program asks for one more than once: to check, to run."""
_LAZY: Mapping[str, type[JsonlRows] | type[ParquetRows]] = {
    ".jsonl": JsonlRows,
    ".parquet": ParquetRows,
}
_READERS: Mapping[str, Callable[[str, bytes], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}


def load_rows(
    path_or_url: str | Path,
    *,
    fields: Sequence[str] = ("prompt",),
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> LoadedRows | LazyRows:
    """All rows of a .jsonl, .json (a list of objects) or .parquet file, local or by URL.

    Every row must have `fields`; a "prompt" among them must be text or chat messages. Each column
    has one type in all rows (`uniform_rows`), and is None where a row lacks the key. Of JSON lines
    and Parquet of more than `in_memory_bytes` the rows are read when they are asked for.
    Raises DataError naming file, line (or row) and what to change.
    """
    name = str(path_or_url)
    suffix = Path(name).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{name}: prompts are read from {', '.join(_READERS)} files, not {suffix or 'this'!r}"
        )
    if _is_large(name, suffix, in_memory_bytes):
        return _lazy_rows(name, suffix, tuple(fields))
    data = read_file(name)
    unit = "line" if suffix == ".jsonl" else "row"
    rows, numbers = [], array("q")
    for number, row in _READERS[suffix](name, data):
        _check_row(row, fields, partial("{}, {} {}".format, name, unit, number))
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise _empty(name, fields)
    loaded = LoadedRows(rows, name=name, unit=unit, numbers=numbers)
    check_ids(loaded)
    loaded[:] = uniform_rows(rows, where=loaded.where)
    return loaded


def _is_large(name: str, suffix: str, in_memory_bytes: int) -> bool:
    if suffix not in _LAZY:
        return False
    try:
        file = RowFile(name)
        found = file.size > in_memory_bytes
        return found or (suffix == ".parquet" and ParquetRows(file).num_bytes > in_memory_bytes)
    except DataError:
        return False  # whoever reads it says what is wrong, with the name as it was given


def _lazy_rows(name: str, suffix: str, fields: tuple[str, ...]) -> LazyRows:
    file = RowFile(name)
    key, stamp = (file.name, fields), file.stamp
    if stamp is not None and _surveyed.get(key, (None,))[0] == stamp:
        return _surveyed[key][1]
    rows = _LAZY[suffix](file)
    rows.survey(lambda row, where: _check_row(row, fields, where))
    if not len(rows):
        raise _empty(name, fields)
    while len(_surveyed) >= _MOST_SURVEYED:
        del _surveyed[next(iter(_surveyed))]
    if stamp is not None:
        _surveyed[key] = (stamp, rows)
    return rows


def _empty(name: str, fields: Sequence[str]) -> DataError:
    has = " with " + " and ".join(map(repr, fields)) if fields else ""
    return DataError(f"{name} holds no rows: give it at least one object{has}")


def _check_row(row: Mapping[str, Any], fields: Sequence[str], where: Callable[[], str]) -> None:
    if all(row.get(field) is not None for field in fields):
        prompt = row.get("prompt")
        if "prompt" not in fields or (type(prompt) is str and prompt):
            return
    _check_fields(row, fields, where())
    if "prompt" in fields:
        check_prompt(row, where=where())


def check_prompt(row: Mapping[str, Any], *, where: str) -> str | list[dict[str, str]]:
    """The row's prompt: text, or a list of {role, content} whose last is not the assistant's.

    Raises DataError, beginning with `where` (such as "prompts.jsonl, line 3").
    """
    _check_fields(row, ("prompt",), where)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{where}: the prompt is empty: a model needs at least one token")
        return prompt
    if not isinstance(prompt, list):
        raise DataError(
            f"{where}: the prompt is {kind_of(prompt)}: give text, or a list of chat messages "
            '[{"role": "user", "content": "…"}]'
        )
    if not prompt:
        raise DataError(f"{where}: the prompt is an empty list: give at least one chat message")
    for number, message in enumerate(prompt):
        here = f"{where}: message {number} of the prompt"
        if not isinstance(message, dict):
            raise DataError(f'{here} is {kind_of(message)}: give {{"role": "…", "content": "…"}}')
        _check_fields(message, ("role", "content"), here)
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise DataError(f"{here} has {kind_of(message[key])} as its {key!r}: give text")
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the last message of the prompt is the assistant's: "
            "end with what the model is to answer"
        )
    return prompt


def near_name(wanted: Sequence[str], row: Mapping[str, Any]) -> str:
    """ ": did you mean 'answer' where it says 'awnser'?", if a name is near one that is missing."""
    missing = [name for name in wanted if row.get(name) is None]
    for name, value in row.items():
        near = get_close_matches(name, missing, n=1)
        if near and value is not None and name not in wanted:
            return f": did you mean {near[0]!r} where it says {name!r}?"
    return ""


def _check_fields(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for field in fields:
        if row.get(field) is not None:
            continue
        if field in row:
            raise DataError(f"{where}: {field!r} is null: give it a value")
        near = get_close_matches(field, list(row), n=1)
        has = ", ".join(repr(key) for key in row) or "nothing"
        hint = f"rename {near[0]!r} to {field!r}" if near else f"it has {has}"
        raise DataError(f"{where}: {field!r} is missing: {hint}")
