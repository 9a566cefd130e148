"""A child run's settings: those of its parent, where nothing else is said.

The decision here: a child is a run of its parent's recipe. Another recipe has other fields, other
modules, and takes a model by `model=run:NAME@VERSION` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from rlhf_flows.attempt.parents import parse_parent
from rlhf_flows.config import EngineConfig, StoreConfig
from rlhf_flows.config_loading import read_settings
from rlhf_flows.errors import ConfigError
from rlhf_flows.records.finding import find_run, open_existing_store
from rlhf_flows.store import RunLayout, read_json

__all__ = ["parent_settings"]

_OF_THE_RUN = ("recipe", "flows", "parent", "run_name", "init_from", "store")
"""What a child has of its own."""


def parent_settings(
    model: type[EngineConfig],
    init_from: str,
    overrides: Sequence[str] = (),
    *,
    file: Path | None = None,
) -> dict[str, Any]:
    """What the parent was asked for beside the defaults, as defaults of a child.

    Args:
        overrides: The child's `key=value` words, which may name the store.
        file: Its YAML file, which may, too.

    Raises:
        ConfigError: no such run, or one of another recipe.
    """
    run, _ = parse_parent(init_from)
    store = open_existing_store(_store_url(overrides, file))
    find_run(store, run)
    config = read_json(store, RunLayout(run).run_json)["config"]
    settings = {name: value for name, value in config.items() if name not in _OF_THE_RUN}
    foreign = [name for name in settings if name not in model.model_fields]
    if foreign:
        raise ConfigError(
            f"run {run!r} is one of recipe {config['recipe']!r}, and its {', '.join(foreign)} mean"
            f" nothing here: take that recipe, or begin with the model by model=run:{init_from}"
        )
    return {**_asked(model, settings), "init_from": init_from}


def _store_url(overrides: Sequence[str], file: Path | None) -> str:
    said = [word.partition("=")[2] for word in overrides if word.startswith("store.url=")]
    if said:
        return said[-1]
    settings = {} if file is None else read_settings(file)
    return str(settings.get("store", {}).get("url", StoreConfig().url))


def _asked(model: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Less what is the default: said, it might contradict what follows from other fields."""
    asked: dict[str, Any] = {}
    for name, value in settings.items():
        field = model.model_fields.get(name)
        if field is None:
            asked[name] = value
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        kind = field.annotation if default is PydanticUndefined else type(default)
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and isinstance(value, Mapping):
            inner = _asked(kind, value)
            if inner or default is PydanticUndefined:
                asked[name] = inner
        elif default is PydanticUndefined or to_jsonable_python(default) != value:
            asked[name] = value
    return asked
