"""Configurations read from defaults, YAML files and `key=value` words, by any pydantic model.

The decision here: an unknown key is refused with the nearest right one, or with the reason where it
is an option of ChatLearn that has no meaning here. Files may include others and ask the
environment, as ChatLearn's do. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_flows.chatlearn_options import ELSEWHERE, RENAMED_SECTIONS
from rlhf_flows.errors import ConfigError

__all__ = ["load_config", "merge_settings", "read_settings"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(
    model: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Builds a configuration from defaults, a YAML file and `key=value` words; later ones win.

    Args:
        overrides: Words such as `runtime.num_episode=3`; values are read as YAML.
        file: A YAML file, a mapping of the same fields.
        defaults: Values under both, in the same nested form.

    Raises:
        ConfigError: an unknown key (with the nearest right one), a wrong value, a wrong file.
    """
    data: dict[str, Any] = _copied(defaults or {})
    if file is not None:
        merge_settings(data, read_settings(file))
    for word in overrides:
        key, sep, text = word.partition("=")
        if not sep or not key:
            raise ConfigError(f"{word!r} is no setting: write it as key=value, as in seed=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"the value of {key!r} is not readable: {text!r} ({e})") from e
        _put(data, key.split("."), value, key)
    _rename_sections(data)
    _refuse_unknown(model, data, path=())
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e)) from e


def _copied(value: Any, where: str = "") -> Any:
    """`value` as a file could hold it: texts, numbers, lists and mappings. Paths become texts."""
    if isinstance(value, Mapping):
        start = f"{where}." if where else ""
        return {str(key): _copied(inner, f"{start}{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner, where) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    raise ConfigError(
        f"setting {where!r} is a {type(value).__name__}: a configuration holds texts, numbers,"
        " lists and dicts; give an object to a module's constructor instead"
    )


def read_settings(file: str | Path) -> dict[str, Any]:
    """The fields of a YAML file, over those of the files that it `includes`.

    `${NAME}` and `${NAME:default}` stand for variables of the environment, wherever they are a
    value or a part of one. Files named inside (`includes`, `model_config_file`) are looked for
    beside the file that names them. The arguments of `models.<name>.model_config_file` become its
    `args_dict`, what is said there already wins.

    Raises:
        ConfigError: a file cannot be read, includes itself, or a variable is not set.
    """
    return _read(Path(file), ())


def _read(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    here = path.expanduser().absolute()
    if here in within:
        chain = " includes ".join(p.name for p in (*within, here))
        raise ConfigError(
            f"the configuration file {here} includes itself: {chain}; leave one of these out"
        )
    found: dict[str, Any] = _resolved(_read_yaml(path), str(path))
    for key in ("includes", "include"):
        named = found.pop(key, None)
        if named is None:
            continue
        if not isinstance(named, str | list):
            raise ConfigError(
                f"{key!r} of {here} is a {type(named).__name__}, expected the name of a file or a"
                " list of them"
            )
        merged: dict[str, Any] = {}
        for name in [named] if isinstance(named, str) else named:
            merge_settings(merged, _read(here.parent / str(name), (*within, here)))
        merge_settings(merged, found)
        found = merged
    _rename_sections(found)
    models = found.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict) and isinstance(model.get("model_config_file"), str):
            file = here.parent / model["model_config_file"]
            arguments = _read(file, (*within, here))
            merge_settings(arguments, model.get("args_dict") or {})
            model["model_config_file"], model["args_dict"] = str(file), arguments
    return found


def _rename_sections(data: dict[str, Any]) -> None:
    for old, new in RENAMED_SECTIONS.items():
        if old in data:
            section = data.pop(old)
            merge_settings(data, {new: section})


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")


def _resolved(value: Any, where: str) -> Any:
    """`value` with the variables of the environment in place."""
    if isinstance(value, Mapping):
        return {key: _resolved(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, where) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def of(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(
                f"{where} asks for the environment variable {name}, which is not set: set it, or"
                f" give a default, ${{{name}:value}}"
            )
        return found

    text = _VARIABLE.sub(of, value)
    # A value that is one variable has the type that it would have if it stood there itself.
    return yaml.safe_load(text) if _VARIABLE.fullmatch(value) else text


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would take the last one, and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping",
                        node.start_mark,
                        f"the key {key.value!r} stands in it twice: leave one of them out",
                        key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise ConfigError(f"the configuration file {path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"the configuration file {path} is not readable as YAML: {e}") from e
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the configuration file {path} holds a {type(loaded).__name__}, expected a mapping"
            " of fields"
        )
    return loaded


def merge_settings(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Puts nested fields over those that are there."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge_settings(into[key], value)
        else:
            into[key] = value


def _put(data: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{key!r} asks for a field inside {part!r}, which is a value")
    if isinstance(value, Mapping) and isinstance(data.get(path[-1]), dict):
        merge_settings(data[path[-1]], value)
    else:
        data[path[-1]] = value


def _refuse_unknown(model: type[BaseModel], data: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for key, value in data.items():
        dotted = ".".join((*path, str(key)))
        field = model.model_fields.get(str(key))
        if field is None:
            _refuse_elsewhere(dotted, path, str(key))
            raise ConfigError(
                f"unknown setting {dotted!r}{_nearest(dotted, _all_keys(model, path))}"
            )
        inner = _model_in(field.annotation)
        if inner is None or not isinstance(value, Mapping):
            continue
        if _is_mapping(field.annotation):
            for name, entry in value.items():
                if isinstance(entry, Mapping):
                    _refuse_unknown(inner, entry, (*path, str(key), str(name)))
        else:
            _refuse_unknown(inner, value, (*path, str(key)))


def _refuse_elsewhere(dotted: str, path: tuple[str, ...], key: str) -> None:
    section = "models.*" if path[:1] == ("models",) and len(path) == 2 else ".".join(path)
    reason = ELSEWHERE.get(section, {}).get(key)
    if reason is not None:
        raise ConfigError(f"setting {dotted!r} of ChatLearn has no meaning here: {reason}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _all_keys(model: type[BaseModel], path: tuple[str, ...]) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield ".".join((*path, name))
        inner = _model_in(field.annotation)
        if inner is not None and not _is_mapping(field.annotation):
            yield from _all_keys(inner, (*path, name))


def _nearest(key: str, known: Iterable[str]) -> str:
    keys = list(known)
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        leaves = {k.rpartition(".")[2]: k for k in reversed(keys)}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known here are {', '.join(sorted(k for k in keys if '.' not in k) or sorted(keys))}"


def _explain(error: ValidationError) -> str:
    parts = []
    for e in error.errors(include_url=False):
        where = ".".join(str(p) for p in e["loc"])
        text = e["msg"].removeprefix("Value error, ")
        if e["type"] == "missing":
            parts.append(f"setting {where!r} is missing: give it as {where}=...")
        elif e["type"] == "value_error" or not where:
            parts.append(text)
        else:
            found = repr(e.get("input"))
            parts.append(f"setting {where!r}: {text[0].lower() + text[1:]}, found {found[:80]}")
    return "; ".join(parts)
