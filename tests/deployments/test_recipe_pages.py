"""The pages of the recipes name every field as it is.

`python -m tests.deployments.test_recipe_pages` writes their tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_flows.config import EngineConfig, RuntimeConfig
from rlhf_flows.deployments import OWN, find_recipe

DOCS = Path(__file__).parents[2] / "docs/recipes"
PAGES = [name for name in OWN if name != "quickstart"]
_TABLE = re.compile(r"<!-- fields of (\w+) -->\n(?:\n\|.*?(?=\n\n|\Z))?", re.DOTALL)


def page(name: str) -> Path:
    return DOCS / ("README.md" if name == "runtime" else f"{name}.md")


def written(text: str) -> str:
    """The page with its tables as they should be."""
    return _TABLE.sub(lambda m: f"<!-- fields of {m[1]} -->\n\n{table(m[1])}", text).rstrip() + "\n"


def table(name: str) -> str:
    if name == "runtime":
        rows = list(_rows("runtime.", RuntimeConfig, frozenset()))
    else:
        rows = list(_rows("", find_recipe(name).config, EngineConfig.model_fields.keys()))
        usual = dict(_rows("runtime.", RuntimeConfig, frozenset()))
        runtime = find_recipe(name).config.model_fields["runtime"].annotation
        assert isinstance(runtime, type)
        assert issubclass(runtime, RuntimeConfig)
        rows += [row for row in _rows("runtime.", runtime, frozenset()) if usual[row[0]] != row[1]]
    lines = [f"| `{field}` | {row} |" for field, row in rows]
    return "\n".join(["| field | default | |", "|---|---|---|", *lines])


def _rows(start: str, model: type[BaseModel], known: Any) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if name in known:
            continue
        inner = _inner(field)
        default = "" if field.is_required() or inner is not None else _shown(field)
        said = (field.description or "").replace("|", "\\|").replace("\n", " ")
        if inner is None or said:
            yield f"{start}{name}", f"{default} | {said}"
        if inner is not None and name not in _TOLD_ONCE:
            yield from _rows(f"{start}{name}.", inner, frozenset())


_TOLD_ONCE = frozenset({"value_optimizer", "eval_generation", "eval_prompts", "eval_dataset"})
"""They have the fields of another one, which is in the table."""


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _shown(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value is None:
        return "none" if value is None else ""
    return f"`{json.dumps(value, default=str)}`"


@pytest.mark.parametrize("name", [*PAGES, "runtime"])
def test_the_page_of_a_recipe_names_its_fields_as_they_are(name: str) -> None:
    text = page(name).read_text("utf-8")
    assert text == written(text), "run python -m tests.deployments.test_recipe_pages"
    assert text.count("<!-- fields of") == 1


if __name__ == "__main__":
    for name in [*PAGES, "runtime"]:
        page(name).write_text(written(page(name).read_text("utf-8")), encoding="utf-8")
