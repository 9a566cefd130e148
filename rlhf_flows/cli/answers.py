"""How commands answer: a table for people, the same as JSON with stable keys for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["AsJson", "RunName", "StoreUrl", "print_json", "print_table"]

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON, on standard output.")]
RunName = Annotated[str, typer.Argument(help="Name of the run.")]
StoreUrl = Annotated[str, typer.Option(help="Store of the runs.")]


def print_json(answer: Any) -> None:
    """Numbers that are not finite become null: JSON has none."""
    sys.stdout.write(json.dumps(_finite(answer), indent=1, default=str, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def print_table(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, title: str = ""
) -> None:
    """A row for each mapping; what is missing in one is empty, numbers have four places.

    Ten columns of numbers fit eighty characters: no rules between them, names in several lines.
    """
    table = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.show_edge = False  # two characters
    found = list(rows)
    for name in columns:
        is_number = all(isinstance(row.get(name), int | float | None) for row in found)
        justify: Literal["left", "right"] = "right" if is_number else "left"
        words = name.replace("_", " ")
        least = max(map(len, words.split())) if is_number else None
        table.add_column(words, justify=justify, overflow="fold", min_width=least)
    for row in found:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console().print(table, markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    # Brackets in a completion are no markup.
    return str(value).replace("[", r"\[")
