"""Things by name: what is registered, and what `package.module:name` says where to import.

The decision here: a registry holds names of its own (lazily, as where to import them from) and
those that a user's program registers; what a configuration asks for may be either, or any
`package.module:name`. Imports nothing until it is asked.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from rlhf_flows.errors import ConfigError, UserError

__all__ = ["Registry", "import_object", "load_module", "nearest"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing."""

    def __init__(self, what: str, own: Mapping[str, str] | None = None) -> None:
        """
        Args:
            what: what its things are called in messages, such as "dataset".
            own: names that need no registration, each with its `package.module:name`.
        """
        self.what = what
        self._own = dict(own or {})
        self._registered: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Makes `value` known as `name`; a second time, as in a notebook, replaces the first.

        Raises ConfigError where the name is one of this package's own, or could not be asked for.
        """
        if name in self._own:
            raise ConfigError(
                f"{self.what} {name!r} is one of rlhf_flows' own: register yours by another name"
            )
        if not name or ":" in name or "=" in name or name != name.strip():
            raise ConfigError(
                f"{name!r} is no name for a {self.what}: use letters, digits, '-' and '_'"
            )
        self._registered[name] = value
        return value

    def names(self) -> list[str]:
        return [*self._own, *self._registered]

    def find(self, name: str) -> T:
        """By its name, or by `package.module:name`.

        Raises ConfigError with the nearest name, or the reason why it cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        where = self._own.get(name, name)
        if ":" not in where:
            raise ConfigError(
                f"unknown {self.what} {name!r}{nearest(name, self.names())}: known are"
                f" {', '.join(self.names()) or 'none'}, and any package.module:name of yours"
            )
        found: T = import_object(where, what=self.what)
        return found


def import_object(
    name: str, *, what: str, kind: str = "name", error: type[UserError] = ConfigError
) -> Any:
    """What `package.module:name` stands for.

    `kind` is what stands behind the colon. Raises `error`, which calls the thing a `what`, with the
    nearest name that can be imported.
    """
    module_name, colon, path = name.partition(":")
    if not (colon and module_name and path):
        raise error(f"{what} {name!r} cannot be imported: write it as package.module:{kind}")
    found = load_module(module_name, asked_by=f"{what} {name!r}", error=error)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise error(
                f"{what} {name!r} cannot be imported: {module_name} has no {attribute!r}"
                f"{nearest(attribute, public) or ', it has ' + ', '.join(public[:8])}"
            )
        found = getattr(found, attribute)
    return found


def load_module(name: str, *, asked_by: str, error: type[UserError] = ConfigError) -> Any:
    """The module of that name. Raises `error`, which begins with `asked_by`, where it cannot be
    imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{name}.".startswith(f"{e.name}."):
            raise error(
                f"{asked_by} cannot be imported: {name} itself imports {e.name!r},"
                " which is not installed here"
            ) from e
        raise error(
            f"{asked_by} cannot be imported: there is no module {e.name!r}"
            f"{nearest(e.name.rpartition('.')[2], _modules_beside(e.name))}. Its folder must be"
            " on PYTHONPATH, or its package installed"
        ) from e
    except Exception as e:  # a user's module may raise anything
        raise error(f"{asked_by} cannot be imported: {name} raises {type(e).__name__}: {e}") from e


def nearest(name: str, names: list[str]) -> str:
    """ " (nearest: 'x')" where one is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]!r})" if near else ""


def _modules_beside(module_name: str) -> list[str]:
    parent = module_name.rpartition(".")[0]
    path = importlib.import_module(parent).__path__ if parent else None
    return [m.name for m in pkgutil.iter_modules(path)]
