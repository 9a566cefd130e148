"""Rows of a prompt file: JSON lines, a JSON list, or Parquet. No torch.

The decision here: the whole file is read and checked at once. Prompt files are small beside what is
trained on them, and a mistake in the last line should not cost a night.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_flows.data.json_rows import json_rows, jsonl_rows
from rlhf_flows.data.parquet_rows import parquet_rows
from rlhf_flows.data.row_files import read_file
from rlhf_flows.data.row_sequences import LoadedRows, check_ids
from rlhf_flows.data.row_types import kind_of, uniform_rows
from rlhf_flows.errors import DataError

__all__ = ["check_prompt", "load_rows", "near_name", "rows_digest"]

_READERS: Mapping[str, Callable[[str, bytes], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}


def load_rows(path_or_url: str | Path, *, fields: Sequence[str] = ("prompt",)) -> LoadedRows:
    """All rows of a .jsonl, .json (a list of objects) or .parquet file, local or by URL.

    Every row must have `fields`; a "prompt" among them must be text or chat messages. Each column
    has one type in all rows (`uniform_rows`), and is None where a row lacks the key.
    Raises DataError naming file, line (or row) and what to change.
    """
    name = str(path_or_url)
    suffix = Path(name).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{name}: prompts are read from {', '.join(_READERS)} files, not {suffix or 'this'!r}"
        )
    data = read_file(name)
    unit = "line" if suffix == ".jsonl" else "row"
    rows, numbers = [], array("q")
    for number, row in _READERS[suffix](name, data):
        _check_row(row, fields, partial("{}, {} {}".format, name, unit, number))
        rows.append(row)
        numbers.append(number)
    if not rows:
        has = " and ".join(repr(field) for field in fields)
        raise DataError(
            f"{name} holds no rows: give it at least one object" + f" with {has}" * bool(has)
        )
    loaded = LoadedRows(rows, name=name, unit=unit, numbers=numbers)
    check_ids(loaded)
    loaded[:] = uniform_rows(rows, where=loaded.where)
    return loaded


def _check_row(row: Mapping[str, Any], fields: Sequence[str], where: Callable[[], str]) -> None:
    if all(row.get(field) is not None for field in fields):
        prompt = row.get("prompt")
        if "prompt" not in fields or (type(prompt) is str and prompt):
            return
    _check_fields(row, fields, where())
    if "prompt" in fields:
        check_prompt(row, where=where())


def rows_digest(rows: Sequence[Any], *, parts: Sequence[int] = ()) -> str:
    """SHA-256 of the rows in their order; the same from whichever kind of file they came.

    `parts`: how many of them belong to each of several datasets.
    """
    digest = sha256()
    for number, row in enumerate(rows):
        try:
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_as_json)
        except DataError as e:
            raise DataError(f"row {number} of the dataset: {e}") from e
        except (TypeError, ValueError, RecursionError) as e:
            raise DataError(
                f"row {number} of the dataset is nothing that a file could hold ({e}): use text,"
                " numbers, tensors, lists and dicts whose keys are text"
            ) from e
        digest.update(text.encode())
        digest.update(b"\n")
    if parts:
        digest.update(json.dumps(list(parts)).encode())
    return digest.hexdigest()


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


def _as_json(value: Any) -> Any:
    """For the digest alone: what rows of a program's own may hold beside what a file can."""
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # a tensor or an array
        return {f"{type(value).__name__} {value.dtype}": value.tolist()}
    raise DataError(
        f"it holds a {type(value).__name__}: use text, numbers, tensors, lists and dicts"
    )
