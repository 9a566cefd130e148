"""What loads what: the cost of `import rlhf_flows`, the floors of the house, the public names.

The table of floors stands in CONTRIBUTING.md. Every import statement counts, also one inside a
function or for type checking only: who needs a type of a higher floor stands on the wrong floor.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_flows

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_flows"

FLOORS = {
    "errors": 0,
    "chatlearn_options": 0,
    "form_schema": 0,
    "config": 0,
    "config_loading": 0,
    "settings": 0,
    "dataset_settings": 0,
    "reward_settings": 0,
    "guard_settings": 0,
    "runtime_settings": 0,
    "registry": 0,
    "generation": 0,
    "together": 0,
    "algorithms": 1,
    "graph": 1,
    "store": 2,
    "data": 2,
    "modules": 3,
    "models": 4,
    "pools": 5,
    "blocks": 6,
    "tasks": 7,
    "attempt": 8,
    "backfill": 8,
    "calls": 8,
    "engine": 8,
    "engines": 8,
    "exports": 8,
    "initialization": 8,
    "flow": 8,
    "records": 8,
    "reporting": 8,
    "services": 8,
    "deployments": 9,
    "cli": 9,
}

LIBRARY_ROOMS = {
    "torch": {"algorithms", "graph", "store", "data", "modules", "models", "pools"},
    "pyarrow": {"store", "data", "records"},
    "fsspec": {"store", "data"},
    "s3fs": {"store", "data"},
    "transformers": {"models"},
    "vllm": {"modules", "models"},
    "megatron": {"modules", "models"},
    "deepspeed": {"modules", "models"},
    "ray": {"pools"},
    "prefect": {
        "blocks",
        "tasks",
        "attempt",
        "engine",
        "flow",
        "reporting",
        "services",
        "deployments",
        "cli",
    },
    "typer": {"cli", "deployments"},
}

# Each of these stays in files that carry its name, such as modules/vllm_module.py.
NAMED_FILES = {"vllm", "megatron", "deepspeed"}

HEAVY = {"torch", "ray", "vllm", "megatron", "prefect", "transformers", "pyarrow"}


def source_files() -> list[Path]:
    """All files of the package, relative to it, those behind the links included."""
    rooms = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir())]
    rooms += [path for room in rooms[1:] for path in room.iterdir() if path.is_dir()]
    return sorted(path.relative_to(PACKAGE) for room in rooms for path in room.glob("*.py"))


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports; `from a import b` gives `a.b`."""
    package = ("rlhf_flows", *path.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


ROOM_FILES = [path for path in source_files() if path != Path("__init__.py")]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after the statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("module", ["rlhf_flows", "rlhf_flows.errors", "rlhf_flows.config"])
def test_the_ground_floor_loads_no_heavy_library(module: str) -> None:
    assert loaded_by(f"import {module}") & HEAVY == set()


def test_blocks_load_beside_prefect_without_torch_or_ray() -> None:
    """Prefect loads them as a collection whenever it starts, its command line included."""
    assert loaded_by("import rlhf_flows.blocks") & (HEAVY - {"prefect"}) == set()


def test_every_file_stands_on_a_floor() -> None:
    homeless = [str(path) for path in ROOM_FILES if room_of(path) not in FLOORS]
    assert not homeless, "give it a floor here and in CONTRIBUTING.md, or put it in a room"


@pytest.mark.parametrize("path", ROOM_FILES, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    floor = FLOORS[room_of(path)]
    for name in imported_names(path):
        top, _, rest = name.partition(".")
        if top == "rlhf_flows":
            room = rest.partition(".")[0]
            assert room in FLOORS, f"{name}: import it from its room"
            assert FLOORS[room] <= floor, f"{path} (floor {floor}) imports {name}, which is above"


@pytest.mark.parametrize("path", ROOM_FILES, ids=str)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for name in imported_names(path):
        library = name.partition(".")[0]
        if FLOORS[room] == 0:
            allowed = {*sys.stdlib_module_names, "rlhf_flows", "pydantic", "pydantic_core", "yaml"}
            assert library in allowed, f"{path} imports {name}: floor 0 is pydantic and YAML only"
        if library in LIBRARY_ROOMS:
            assert room in LIBRARY_ROOMS[library], f"{path} imports {name}: not in this room"
        if library in NAMED_FILES:
            is_named = path.name.startswith(library) or library in path.parent.parts
            assert is_named, f"{path} imports {name}: only {library}*.py and {library}/ may"


def test_public_names_resolve() -> None:
    for name in rlhf_flows.__all__:
        assert getattr(rlhf_flows, name) is not None
        assert name in dir(rlhf_flows)


def test_public_names_are_sorted_and_unique() -> None:
    assert rlhf_flows.__all__ == sorted(set(rlhf_flows.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        rlhf_flows.Motor  # noqa: B018
