"""Sections of the configuration as a module sees them: read by name, `args.seed`, or by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

__all__ = ["Args"]


class Args(Mapping[str, Any]):
    """A read-only mapping whose keys are attributes, too; mappings inside are as well.

    `get` answers None for what is not there, an attribute or a key raises.
    """

    __slots__ = ("_values", "_where")

    def __init__(self, values: Mapping[str, Any], where: str = "args") -> None:
        """`where` names the section in errors, such as "models.policy"."""
        self._values = values
        self._where = where

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(self._missing(name))
        return self[name]

    def _missing(self, name: str) -> str:
        near = get_close_matches(name, list(self._values), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {sorted(self._values)}"
        return f"{self._where} has no {name!r}: {hint}"

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(self._missing(name))
        value = self._values[name]
        return Args(value, f"{self._where}.{name}") if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Args({dict(self._values)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Args, (dict(self._values), self._where)
