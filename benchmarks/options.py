"""A frozen dataclass as options of a command line, and back: how a side is told its work."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["from_command_line", "options_of"]

Work = TypeVar("Work", bound="DataclassInstance")


def options_of(work: DataclassInstance) -> list[str]:
    return [f"--{name}={value}" for name, value in asdict(work).items()]


def from_command_line(kind: type[Work]) -> Work:
    """The fields may be texts, ints and floats."""
    parser = argparse.ArgumentParser()
    for name, field in kind.__dataclass_fields__.items():
        read: Any = {"int": int, "float": float}.get(str(field.type), str)
        parser.add_argument(f"--{name}", type=read, required=True)
    return kind(**vars(parser.parse_args()))
