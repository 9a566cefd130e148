"""Rows of a prompt file: JSON lines, a JSON list, or Parquet. No torch.

The decision here: the whole file is read and checked at once. Prompt files are small beside what is
trained on them, and a mistake in the last line should not cost a night.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_flows.data.row_types import kind_of, uniform_rows
from rlhf_flows.errors import DataError

__all__ = ["check_prompt", "load_rows", "rows_digest"]

_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_rows(
    path_or_url: str | Path, *, fields: Sequence[str] = ("prompt",)
) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .json (a list of objects) or .parquet file, local or by URL.

    Every row must have `fields`; a "prompt" among them must be text or chat messages. Each column
    has one type in all rows (`uniform_rows`), and is None where a row lacks the key.
    Raises DataError naming file, line (or row) and what to change.
    """
    name = str(path_or_url)
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{name}: prompts are read from {', '.join(_SUFFIXES)} files, not {suffix or 'this'!r}"
        )
    data = _read(name)
    if suffix == ".parquet":
        numbered = _parquet_rows(name, data)
    elif suffix == ".json":
        numbered = _json_rows(name, data)
    else:
        numbered = _jsonl_rows(name, data)
    rows, wheres = [], []
    for where, row in numbered:
        _check_fields(row, fields, where)
        if "prompt" in fields:
            check_prompt(row, where=where)
        rows.append(row)
        wheres.append(where)
    if not rows:
        has = " ".join(repr(field) for field in fields)
        raise DataError(f"{name} holds no rows: give it at least one object with {has}")
    return uniform_rows(rows, wheres=wheres)


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


def _read(name: str) -> bytes:
    if "://" not in name:
        try:
            return Path(name).read_bytes()
        except FileNotFoundError as e:
            raise DataError(f"{name}: there is no such file{_near_file(Path(name))}") from e
        except OSError as e:
            raise DataError(f"{name} cannot be read: {e.strerror}") from e
    import fsspec  # only URLs need it

    failures: tuple[type[Exception], ...] = (OSError, ImportError, ValueError)
    failures += _errors_of_s3(name)
    try:
        with fsspec.open(name, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as e:
        raise DataError(f"{name}: there is no such object: check bucket and key") from e
    except failures as e:
        raise DataError(f"{name} cannot be read: {e}") from e


def _errors_of_s3(name: str) -> tuple[type[Exception], ...]:
    """What s3fs lets through untranslated: no credentials, no such endpoint."""
    if not name.startswith("s3://"):
        return ()
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # then s3fs is missing, too, and says so itself
        return ()
    return (BotoCoreError, ClientError)


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": {path.parent} is not a folder"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ""


def _jsonl_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _object(_parse(line, where), where)


def _json_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    if not data.strip():
        return
    found = _parse(data.removeprefix(b"\xef\xbb\xbf"), name)
    if not isinstance(found, list):
        raise DataError(
            f"{name} holds {kind_of(found)}: a .json file of prompts is one list of objects; "
            "for one object a line, name the file .jsonl"
        )
    for number, row in enumerate(found):
        where = f"{name}, row {number}"
        yield where, _object(row, where)


def _parquet_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
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
    for number, row in enumerate(table.to_pylist()):
        yield f"{name}, row {number}", row


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


def _parse(text: bytes, where: str) -> Any:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{where}: byte {e.start} (0x{text[e.start]:02x}) is not UTF-8: save the file as UTF-8"
        ) from e
    try:
        found = json.loads(decoded)
    except json.JSONDecodeError as e:
        at = f"column {e.colno}" if e.lineno == 1 else f"line {e.lineno}, column {e.colno}"
        raise DataError(
            f"{where}, {at}: this is not JSON ({e.msg}): {_around(decoded, e.pos)}"
        ) from e
    except ValueError as e:  # an int of thousands of digits
        raise DataError(f"{where}: this JSON cannot be read ({e})") from e
    except RecursionError as e:
        raise DataError(f"{where}: lists or objects are nested too deeply: flatten them") from e
    if "\\ud" in decoded.lower():
        _check_surrogates(found, where)
    return found


def _check_surrogates(found: Any, where: str) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start])
        raise DataError(
            f"{where}: {half} is half of a surrogate pair, which is no text: "
            "write the character in UTF-8, or as both halves"
        ) from e


def _around(text: str, position: int) -> str:
    start = max(0, position - 20)
    return repr(text[start : position + 20])


def _object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DataError(
            f'{where}: this is {kind_of(found)}, not an object: write {{"prompt": "…"}}'
        )
    return found


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
