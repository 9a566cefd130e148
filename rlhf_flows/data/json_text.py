"""Nested dicts and lists as JSON text, and back, with nothing lost and nothing changed in silence.

The decision here: only what JSON keeps exactly may be written (dict with text keys, list, str,
int, float, bool, None); a tuple, an int as a key or a numpy scalar would come back as something
else, so a run that resumes from its shards would see other values than one that went on. NaN and
infinity, which strict readers of JSON refuse, are written as {"$float": "nan"}.
"""

from __future__ import annotations

import json
import math
from typing import Any

from rlhf_flows.errors import DataError

__all__ = ["from_json_text", "to_json_text"]

_FLOAT = "$float"


def to_json_text(value: Any, *, where: str) -> str:
    """`where` ("column 'info', row 3") begins the message of the DataError, if there is one."""
    return json.dumps(_plain(value, where), ensure_ascii=False, separators=(",", ":"))


def from_json_text(text: str) -> Any:
    return json.loads(text, object_hook=_restore)


def _plain(value: Any, where: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if kind is list:
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise DataError(
                    f"{where} has the key {key!r} ({type(key).__name__}): "
                    "JSON keeps text keys only; use str(key)"
                )
        if value.keys() == {_FLOAT}:
            raise DataError(f"{where} is a dict with {_FLOAT!r} as its only key: rename the key")
        return {key: _plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    raise DataError(f"{where} holds a {kind.__module__}.{kind.__qualname__}: {_advice(value)}")


def _restore(found: dict[str, Any]) -> Any:
    return float(found[_FLOAT]) if found.keys() == {_FLOAT} else found


def _advice(value: Any) -> str:
    if isinstance(value, tuple | set | frozenset):
        return "make it a list"
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return "make it a plain number with .item()"
    if hasattr(value, "tolist"):
        return "give it a column of its own, or make it a list with .tolist()"
    if isinstance(value, bytes | bytearray):
        return "give bytes a column of their own"
    return "use dict, list, str, int, float, bool or None"
