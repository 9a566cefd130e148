"""How settings look in the form that Prefect makes of their JSON schema.

The decision here: the schema says two things, and they are kept apart. What the server checks stays
whole, in the definitions; what a person is shown is a choice of views over it. A section shows its
essentials until "All settings" is chosen; an optional value is an empty box instead of a switch to
"None"; what is needed comes first. Whoever sends parameters by the API notices none of it.

Written for the form of Prefect 3.7: it sorts fields by `position`, shows each of `anyOf` as a
button where that stands at the field itself, and does not read `if` and `then`, which the server
checks. Pydantic alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["plain_title", "shape_form", "starts_empty"]

Schema = dict[str, Any]

ALL_SETTINGS = "All settings"
ESSENTIALS = "Essentials"
USUAL = "Usual settings"

_UNITS = {"s": "(seconds)", "bytes": "(bytes)", "mb": "(MiB)"}
_WORDS = {
    "num": "number of",
    "coef": "weight",
    "len": "length",
    "env": "environment",
    "eval": "evaluation",
    "eps": "epsilon",
    "args": "arguments",
    **{word: word.upper() for word in ("kl", "url", "gpu", "cpu", "ema", "sft", "ppo", "dpo")},
    "grpo": "GRPO",
    "cpus": "CPUs",
}
_TYPES = {
    "string": "Text",
    "integer": "Number",
    "number": "Number",
    "boolean": "Yes or no",
    "array": "List",
    "null": "None",
}


def plain_title(name: str) -> str:
    """A field's name in words: `retry_budget_s` is "Retry budget (seconds)"."""
    *words, last = name.strip("_").split("_")
    spoken = [_WORDS.get(word, word) for word in words]
    spoken.append(_UNITS.get(last, _WORDS.get(last, last)) if words else _WORDS.get(last, last))
    text = " ".join(spoken)
    return text[0].upper() + text[1:]


def shape_form(
    schema: Schema,
    model: type[BaseModel],
    *,
    first: Sequence[str],
    last: Sequence[str],
    needs: Mapping[str, tuple[Sequence[Any], str]],
) -> None:
    """Changes the schema of one model in place.

    Args:
        first: Fields that come first, in this order.
        last: Fields that come last.
        needs: By field, values under which another field must be given, and that field's name:
            what the server can then refuse before a run starts.
    """
    properties: dict[str, Schema] = schema.get("properties", {})
    by_schema_name = {field.alias or name: field for name, field in model.model_fields.items()}
    for name, shown in properties.items():
        field = by_schema_name[name]
        shown["title"] = _said(model, name, "title") or plain_title(name)
        description = _said(model, name, "description")
        if description is not None:
            shown["description"] = description
        _simplify(shown)
        section = _model_of(field)
        if section is not None:
            _show_section(shown, section)
    known = [name for name in first if name in properties]
    rest = [name for name in properties if name not in known and name not in last]
    order = [*known, *rest, *(name for name in last if name in properties and name not in known)]
    schema["properties"] = {
        name: {**properties[name], "position": position} for position, name in enumerate(order)
    }
    if needs:
        schema["dependentSchemas"] = {
            name: {
                "if": {"properties": {name: {"enum": list(values)}}},
                "then": {"required": [other]},
            }
            for name, (values, other) in needs.items()
        }


def starts_empty(shown: Schema) -> None:
    """For `json_schema_extra` of a field that another one decides where it is not given: a form
    that sent its default would contradict that.
    """
    shown.pop("default", None)


def _text_or_fields(shown: Schema, text: str) -> None:
    """The field may be one text, named so, in place of its fields: two buttons, the text first."""
    branches = [b for b in _branches(shown) if b.get("type") != "null"]
    nothing = [b for b in _branches(shown) if b.get("type") == "null"]
    shown.pop("$ref", None)
    shown["anyOf"] = [*nothing, {"type": "string", "title": text}, *branches]
    _check_fields(shown, branches[0])


def _branches(shown: Schema) -> list[Schema]:
    return [{"$ref": shown["$ref"]}] if "$ref" in shown else list(shown.get("anyOf", ()))


def _check_fields(shown: Schema, reference: Schema) -> None:
    """So that an error names the field inside, and not that none of the views fits."""
    shown["if"] = {"type": "object"}
    shown["then"] = dict(reference)


def _simplify(shown: Schema) -> None:
    """An optional value: an empty box, or one more choice."""
    branches = shown.get("anyOf")
    if branches is None:
        return
    values = [b for b in branches if b.get("type") != "null"]
    if len(values) == len(branches) or len(values) != 1 or "$ref" in values[0]:
        # Nothing first, which is the default.
        branches.sort(key=lambda branch: branch.get("type") != "null")
        _name_branches(branches)
        return
    value = values[0]
    if shown.get("default") is not None:  # "None" must stay something that can be chosen
        _name_branches(branches)
        return
    if value.get("type") == "boolean" or "enum" in value:
        choices = [True, False] if value.get("type") == "boolean" else list(value["enum"])
        del shown["anyOf"]
        shown["enum"] = [None, *choices]
    else:
        # Left empty, it is not sent. Prefect's own check takes null for it all the same.
        del shown["anyOf"]
        shown.pop("default", None)
        shown.update({key: part for key, part in value.items() if key != "title"})


def _name_branches(branches: list[Schema]) -> None:
    for branch in branches:
        if "$ref" not in branch and branch.get("type") in _TYPES:
            branch.setdefault("title", _TYPES[branch["type"]])


def _show_section(shown: Schema, section: type[BaseModel]) -> None:
    text = getattr(section, "form_text", None)
    if text is not None:
        _text_or_fields(shown, text)
        return
    if "$ref" not in shown:
        return
    essentials = getattr(section, "form_first", ())
    if set(essentials) >= section.model_fields.keys():
        return
    reference = {"$ref": shown.pop("$ref")}
    view: Schema = {
        "type": "object",
        "title": ESSENTIALS if essentials else USUAL,
        "properties": _view(section, essentials),
    }
    shown["anyOf"] = [view, reference]
    _check_fields(shown, reference)


_LOOKS = frozenset(
    {"type", "title", "description", "default", "enum", "items", "anyOf", "position"}
)
"""What the form needs of a field; its bounds are checked by the definition, which `then` names."""


def _view(section: type[BaseModel], names: Sequence[str]) -> dict[str, Schema]:
    shown = section.model_json_schema()["properties"]
    return {
        name: {key: part for key, part in shown[name].items() if key in _LOOKS}
        for name in names
        if name in shown
    }


def _said(model: type[BaseModel], name: str, what: str) -> str | None:
    """A field's title or description: its own, or that of the class whose field it overrides."""
    for base in model.__mro__:
        field = getattr(base, "model_fields", {}).get(name)
        text: str | None = getattr(field, what, None)
        if text is not None:
            return text
    return None


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings that a field holds, or may hold."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None
