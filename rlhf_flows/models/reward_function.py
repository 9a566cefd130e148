"""A user's reward function: found by its name, its signature read, its arguments picked.

The decision here: the function says by its own parameters what it wants, and gets it by keyword. A
parameter is the name of a column (`prompt`, `completion`, any column of the prompt file, any other
column of the batch); parameters named `prompts` or `completions`, or the decorator
`@batch_reward`, say that it takes a whole batch at once. Calling it is in function_reward.py.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_flows.errors import RewardError
from rlhf_flows.registry import import_object

__all__ = ["RewardFunction", "batch_reward"]

F = TypeVar("F", bound=Callable[..., Any])

PLURAL = {"prompts": "prompt", "completions": "completion"}
"""What a batch function may call these columns; every column has its own name, too."""


def batch_reward(function: F) -> F:
    """Marks a reward function that takes lists, one value per sample, and returns as many."""
    function.__dict__["takes_batch"] = True
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A callable, and how to call it."""

    call: Callable[..., Any]
    label: str
    takes_batch: bool
    is_async: bool
    parameters: tuple[str, ...]
    """Names that it takes, besides those that `**kwargs` catches."""
    required: tuple[str, ...]
    takes_all: bool
    """Whether it has `**kwargs`, and so gets every column."""

    @classmethod
    def find(cls, function: str | Callable[..., Any]) -> RewardFunction:
        """Imports `package.module:function` where a name is given, and reads the signature.

        Raises:
            RewardError: it cannot be imported (with the nearest name that can), is no function, or
                takes no completion.
        """
        call = (
            import_object(function, what="reward", kind="function", error=RewardError)
            if isinstance(function, str)
            else function
        )
        label = function if isinstance(function, str) else _label(function)
        if not callable(call):
            raise RewardError(
                f"reward {label!r} is of type {type(call).__name__}, expected a function"
            )
        try:
            parameters = inspect.signature(call).parameters.values()
        except ValueError as e:
            raise RewardError(
                f"the parameters of reward {label!r} cannot be read ({e}): wrap it in a function"
                " of yours, def reward(prompt, completion): ..."
            ) from e
        fixed = [p for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if fixed:
            raise RewardError(
                f"reward {label!r} takes {fixed[0].name!r} by position only, but columns are"
                " passed by name: remove the `/` from its parameters"
            )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = tuple(p.name for p in named)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not takes_all and not {"completion", "completions"} & set(names):
            raise RewardError(
                f"reward {label!r} takes ({', '.join(names)}), and no completion: name a parameter"
                " `completion` (one sample a call) or `completions` (a list of them)"
            )
        body = call if inspect.isroutine(call) else getattr(call, "__call__", call)  # noqa: B004
        return cls(
            call=call,
            label=label,
            takes_batch=bool(getattr(call, "takes_batch", False))
            or bool(PLURAL.keys() & set(names)),
            is_async=inspect.iscoroutinefunction(body),
            parameters=names,
            required=tuple(p.name for p in named if p.default is p.empty),
            takes_all=takes_all,
        )

    def pick(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns it takes, under the names of its parameters.

        Raises:
            RewardError: it needs one that the batch does not have.
        """
        missing = [n for n in self.required if PLURAL.get(n, n) not in columns and n not in columns]
        if missing:
            near = difflib.get_close_matches(missing[0], columns, n=1)
            raise RewardError(
                f"reward {self.label!r} needs {missing[0]!r}, which no sample has"
                + (f" (nearest: {near[0]!r})" if near else "")
                + f": the columns are {', '.join(sorted(columns))}. Add it to the rows of the"
                " prompt file, or give the parameter a default"
            )
        picked = dict(columns) if self.takes_all else {}
        for name in self.parameters:
            column = name if name in columns else PLURAL.get(name, name)
            if column in columns:
                picked[name] = columns[column]
        return picked


def _label(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
