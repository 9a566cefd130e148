"""Rows of JSON: an object on each line, or one list of them. No torch."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

from rlhf_flows.data.row_files import RowFile
from rlhf_flows.data.row_sequences import LazyRows
from rlhf_flows.data.row_survey import CheckRow, Survey
from rlhf_flows.data.row_types import kind_of
from rlhf_flows.errors import DataError

__all__ = ["JsonlRows", "json_rows", "jsonl_rows"]

_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""


class JsonlRows(LazyRows):
    """Rows of a file of lines: for each, where it begins and a checksum."""

    def __init__(self, file: RowFile) -> None:
        super().__init__(file)
        self._starts = array("q")
        self._checksums = array("I")
        self._skipped = array("q")
        """For each blank line, the row that comes after it."""

    def survey(self, check: CheckRow) -> None:
        """Reads every line, once. Raises DataError naming file and line."""
        survey, start = Survey(self, check), 0
        with self.file.stream() as lines:
            for number, line in enumerate(lines, start=1):
                text = line.rstrip()
                if number == 1 and text.startswith(_MARK):
                    text, start, line = text[len(_MARK) :], len(_MARK), line[len(_MARK) :]
                if text:
                    self._starts.append(start)
                    self._checksums.append(crc32(text))
                    survey.add(parse_line(text, self.file.name, number))
                else:
                    self._skipped.append(len(self._starts))
                start += len(line)
        survey.finish()

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Mapping[str, Any]:
        ends = self._starts[index + 1] if index + 1 < len(self) else self.file.size
        text = self.file.read(self._starts[index], ends).partition(b"\n")[0].rstrip()
        if crc32(text) != self._checksums[index]:
            raise DataError(
                f"{self.where(index)} is not what it was when the file was checked: a file may not"
                " change while a run uses it; start the run again, and it takes what is there now"
            )
        return parse_line(text, self.file.name, self._line(index))

    def where(self, index: int) -> str:
        return f"{self.file.name}, line {self._line(index)}"

    def _line(self, index: int) -> int:
        return index + 1 + bisect_right(self._skipped, index)


def jsonl_rows(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, with the line's number, from 1."""
    for number, line in enumerate(data.removeprefix(_MARK).split(b"\n"), start=1):
        if line.strip():
            yield number, parse_line(line, name, number)


def parse_line(line: bytes, name: str, number: int) -> dict[str, Any]:
    """Raises DataError naming file and line where it is no object of JSON."""
    try:  # almost every line is well, and its name is then not needed
        found = json.loads(line.decode())
        if type(found) is dict and b"\\u" not in line:
            return found
    except (ValueError, RecursionError):
        pass
    where = f"{name}, line {number}"
    return _object(_parse(line, where), where)


def json_rows(name: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of one list, each with its place, from 0."""
    if not data.strip():
        return
    found = _parse(data.removeprefix(_MARK), name)
    if not isinstance(found, list):
        raise DataError(
            f"{name} holds {kind_of(found)}: a .json file of prompts is one list of objects; "
            "for one object a line, name the file .jsonl"
        )
    for number, row in enumerate(found):
        yield number, _object(row, f"{name}, row {number}")


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
