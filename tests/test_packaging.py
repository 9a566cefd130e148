"""What arrives at a user's: the folders behind the links, as real files, and the entry points.

`rlhf_flows/tasks` and its like are links to top-level folders. So one file has one import name in
the checkout, in an editable install and in a wheel, and a user's own `tasks` package is left alone.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import rlhf_flows

ROOT = Path(__file__).parents[1]
LINKED = ("blocks", "deployments", "tasks")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "rlhf_flows", *LINKED)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree; needs no network."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "."], cwd=tree, check=True)
    (path,) = tree.glob("*.whl")
    return zipfile.ZipFile(path)


def importing_from(folder: Path, *, pythonpath: str) -> dict[str, str | None]:
    """Where a fresh interpreter, started in `folder`, finds `tasks` and `rlhf_flows.tasks`."""
    program = (
        "import importlib.util as u, json\n"
        "specs = {name: u.find_spec(name) for name in ('tasks', 'rlhf_flows.tasks')}\n"
        "print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": pythonpath},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", LINKED)
def test_linked_rooms_are_relative_links_that_resolve(name: str) -> None:
    link = ROOT / "rlhf_flows" / name
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_links_are_committed_as_links() -> None:
    paths = [f"rlhf_flows/{name}" for name in LINKED]
    listing = subprocess.run(
        ["git", "ls-files", "--stage", *paths], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert [line.split()[0] for line in listing.stdout.splitlines()] == ["120000"] * len(LINKED)


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [
        path for depth in ("", "*/", "*/*/") for path in ROOT.glob(f"rlhf_flows/{depth}__init__.py")
    ]
    assert sorted(listed) == sorted(".".join(path.relative_to(ROOT).parts[:-1]) for path in files)


def test_wheel_holds_every_module_as_a_real_file(wheel: zipfile.ZipFile) -> None:
    rooms = [path for depth in ("", "*/", "*/*/") for path in ROOT.glob(f"rlhf_flows/{depth}")]
    ours = {str(path.relative_to(ROOT)) for room in rooms for path in room.glob("*.py")}
    packed = {info.filename: info for info in wheel.infolist()}
    assert ours <= packed.keys()
    assert "rlhf_flows/py.typed" in packed
    assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in packed.values())


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"rlhf_flows", f"rlhf_flows-{rlhf_flows.__version__}.dist-info"}


def test_wheel_announces_command_and_prefect_collection(wheel: zipfile.ZipFile) -> None:
    entry_points = configparser.ConfigParser()
    info = f"rlhf_flows-{rlhf_flows.__version__}.dist-info"
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert entry_points["console_scripts"]["rlhf-flows"] == "rlhf_flows.cli:main"
    assert entry_points["prefect.collections"]["rlhf_flows"] == "rlhf_flows.blocks"


@pytest.mark.parametrize("install", ["editable", "wheel"])
def test_a_users_own_tasks_package_is_not_shadowed(
    install: str, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    pythonpath = ""
    if install == "wheel":
        wheel.extractall(tmp_path / "site")
        pythonpath = str(tmp_path / "site")
    project = tmp_path / "project"
    (project / "tasks").mkdir(parents=True)
    (project / "tasks" / "__init__.py").touch()

    found = importing_from(project, pythonpath=pythonpath)

    home = Path(pythonpath) if install == "wheel" else ROOT
    assert found["tasks"] == str(project / "tasks" / "__init__.py")
    assert found["rlhf_flows.tasks"] == str(home / "rlhf_flows" / "tasks" / "__init__.py")


def test_an_installed_package_brings_no_top_level_tasks(tmp_path: Path) -> None:
    assert importing_from(tmp_path, pythonpath="")["tasks"] is None
