"""Kinds of datasets by name: what makes items of rows.

The decision here: a dataset is a torch map-style class that is given rows, tokenizer and a limit;
`register_dataset` makes one's own known by a name, as a configuration can say it. What a class is
given is checked against its signature before anything starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rlhf_flows.errors import ConfigError, DataError, RlhfFlowsError
from rlhf_flows.registry import Registry, nearest

__all__ = ["DATASETS", "check_dataset", "find_dataset", "make_dataset", "register_dataset"]

Class = TypeVar("Class", bound=type)

DATASETS: Registry[Any] = Registry(
    "dataset",
    {
        "prompt_answer": "rlhf_flows.data.demonstrations:DemonstrationDataset",
        "rw_pair": "rlhf_flows.data.preferences:PreferenceDataset",
        "prompt": "rlhf_flows.data.prompts:PromptDataset",
    },
)


def register_dataset(name: str, cls: Class) -> Class:
    """Makes a dataset of one's own known as `name`, for `dataset.type=name` and `dataset=name`.

    `cls` is a torch map-style dataset: constructed as `cls(rows, tokenizer, max_tokens=…, **args)`,
    with `__len__`, and a `__getitem__` that returns a dict of columns: `prompt_ids` and, to learn
    from, `response_ids` (or `chosen_ids` and `rejected_ids`), each a 1-D tensor of token ids of any
    length; other columns travel along.

    Raises ConfigError for a name that is taken or cannot be asked for, and for what is no such
    class.
    """
    _check_class(cls, f"dataset {name!r}")
    DATASETS.register(name, cls)
    return cls


def find_dataset(kind: str | type) -> type:
    """The class of that name, of `package.module:Class`, or the class itself.

    Raises ConfigError with the nearest name, or with what a class of datasets needs.
    """
    found = DATASETS.find(kind) if isinstance(kind, str) else kind
    _check_class(found, f"dataset {kind!r}" if isinstance(kind, str) else "the dataset")
    assert isinstance(found, type)
    return found


def check_dataset(cls: type, args: Mapping[str, Any]) -> None:
    """Raises ConfigError where `cls(rows, tokenizer, max_tokens=…, **args)` cannot be called."""
    parameters = list(inspect.signature(cls).parameters.values())
    known = [p.name for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes = ", ".join(n for n in known if n != "max_tokens") or "none"
    taken = {"rows", "tokenizer", "max_tokens"} & set(args)
    if taken:
        raise ConfigError(
            f"argument {min(taken)!r} of dataset {cls.__name__} is given by the module: leave it"
            f" out of the arguments; yours to give are {takes}"
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in args:
            if name not in known:
                raise ConfigError(
                    f"dataset {cls.__name__} has no argument {name!r}{nearest(name, known)}: it"
                    f" takes {takes}"
                )
    try:
        inspect.signature(cls).bind([], None, max_tokens=1, **args)
    except TypeError as e:
        raise ConfigError(
            f"dataset {cls.__name__} cannot be made ({e}): it is called as"
            f" {cls.__name__}(rows, tokenizer, max_tokens=…, **args), and the arguments are"
            f" {dict(args) or 'none'}"
        ) from e


def make_dataset(
    cls: type,
    rows: Sequence[Any],
    tokenizer: Any,
    *,
    max_tokens: int,
    args: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Any:
    """A dataset of the rows. `defaults` are given to the kinds above alone, where they take them.

    Raises DataError for what a class of one's own raises.
    """
    is_own = cls.__module__.startswith("rlhf_flows.")
    known = inspect.signature(cls).parameters if is_own else {}
    options = {name: value for name, value in defaults.items() if name in known} | dict(args)
    try:
        return cls(rows, tokenizer, max_tokens=max_tokens, **options)
    except RlhfFlowsError:
        raise
    except Exception as e:  # a user's class may raise anything
        raise DataError(
            f"dataset {cls.__name__} cannot be made of the rows ({type(e).__name__}: {e}): look at"
            " what its __init__ expects of a row"
        ) from e


def _check_class(found: Any, what: str) -> None:
    if not isinstance(found, type):
        raise ConfigError(
            f"{what} is a {type(found).__name__}, expected a class: a torch Dataset that is called"
            " as cls(rows, tokenizer, max_tokens=…)"
        )
    for method in ("__len__", "__getitem__"):
        # A torch Dataset has a __getitem__ that only says that it is missing.
        own = next((base for base in found.__mro__ if method in vars(base)), None)
        if own is None or own.__module__.startswith("torch.utils.data"):
            raise ConfigError(
                f"{what}, {found.__name__}, has no {method}: a map-style dataset has __len__ and"
                " __getitem__(index), which returns a dict of columns"
            )
