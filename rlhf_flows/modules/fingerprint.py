"""Bytes that stand for the code and the arguments of an object, the same in every process.

A pickle would not do: it holds addresses, sets in any order, and only names for importable code.
Here functions and classes count with their compiled code, importable ones too, so that a mended
reward function is seen as another.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

__all__ = ["fingerprint"]

_DEPTH = 8


def fingerprint(value: Any) -> bytes:
    """Bytes of `value`: of its class's code, and of its attributes."""
    return "\n".join(_lines(value, _DEPTH, set())).encode()


def _lines(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if value is None or isinstance(value, str | int | float | bool | bytes | PurePath):
        yield f"{type(value).__name__}:{value!r}"
        return
    if depth == 0 or id(value) in seen:
        yield f"...{type(value).__qualname__}"
        return
    seen.add(id(value))
    if isinstance(value, types.CodeType):
        yield f"code:{value.co_name}:{value.co_code.hex()}:{value.co_names}"
        for constant in value.co_consts:
            yield from _lines(constant, depth, seen)
    elif isinstance(value, types.FunctionType):
        yield from _lines(value.__code__, depth, seen)
        for cell in value.__closure__ or ():
            yield from _lines(cell.cell_contents, depth - 1, seen)
        yield from _lines(value.__defaults__, depth - 1, seen)
    elif isinstance(value, types.MethodType):
        yield from _lines(value.__func__, depth - 1, seen)
    elif isinstance(value, Mapping):
        yield from _items(value, depth, seen)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__}:{len(value)}"
        for item in value:
            yield from _lines(item, depth - 1, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(line for item in value for line in _lines(item, depth - 1, seen))
    elif isinstance(value, type):
        yield f"class:{value.__module__}.{value.__qualname__}"
        for name, member in sorted(vars(value).items()):
            if isinstance(member, types.FunctionType | staticmethod | classmethod | property):
                yield from _lines(_function_of(member), depth - 1, seen)
            elif isinstance(member, str | int | float | bool) and not name.startswith("__"):
                yield f"{name}={member!r}"
    elif hasattr(value, "__dict__"):
        yield f"object:{type(value).__module__}.{type(value).__qualname__}"
        if not type(value).__module__.startswith(("torch", "numpy", "builtins")):
            for ancestor in type(value).__mro__[:-1]:
                yield from _lines(ancestor, depth - 1, seen)
        state = {k: v for k, v in vars(value).items() if k != "_context"}
        # Not as a value: `seen` holds ids, and that of a dict which ends here comes again.
        yield from _items(state, depth, seen)
    else:
        yield f"{type(value).__qualname__}:{value!r}" if " at 0x" not in repr(value) else "object"


def _items(values: Mapping[Any, Any], depth: int, seen: set[int]) -> Iterator[str]:
    for key in sorted(values, key=repr):
        yield f"key:{key!r}"
        yield from _lines(values[key], depth - 1, seen)


def _function_of(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)
