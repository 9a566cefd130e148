"""Is everything there that a run needs? A line for each thing that was looked at.

The decision here: a look, and no more. Nothing is started but a probe of the store, which removes
what it wrote; each line that is not ok says the next step.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from rlhf_flows.errors import RlhfFlowsError
from rlhf_flows.services.environment import is_server_configured
from rlhf_flows.services.prefect_server import check_configured_server
from rlhf_flows.store import open_store, probe_put_if_absent

__all__ = ["Line", "examine"]

_GIB = 1 << 30
_LOCK = Path(__file__).parents[2] / "locks" / "linux-x86_64-cpu.txt"
"""In a checkout; an installed package has its requirements alone."""
_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one look found."""

    what: str
    state: Literal["ok", "warning", "wrong"]
    found: str
    next_step: str = ""
    """What to do; "" where it is ok."""


def examine(*, store: str = "runs", address: str | None = None) -> Iterator[Line]:
    """Looks at Python, packages, Ray, Prefect, the store, GPUs, disk and shared memory.

    Args:
        store: The store that runs are to use. A local folder that is not there yet is probed at the
            nearest one above that is, and is not made.
        address: `host:port` of the Ray head that runs are to use; none starts one of their own.
    """
    yield _python()
    yield from _packages()
    yield _vllm()
    yield _ray(address)
    yield _prefect()
    yield _store(store)
    yield _gpu()
    yield _room("disk", _existing(store), wanted=5 * _GIB, least=_GIB)
    if _SHARED.is_dir():
        yield _room("shared memory", _SHARED, wanted=2 * _GIB, least=_GIB // 2)


def _python() -> Line:
    found = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Line(what="Python", state="ok", found=found)
    step = "make an environment of Python 3.11, which is measured, or 3.12"
    return Line(what="Python", state="wrong", found=found, next_step=step)


def _packages() -> Iterator[Line]:
    """Those that the package requires, against its own range and the lock of a checkout."""
    locked = dict(_locked())
    try:
        said = requires("rlhf-flows") or []
    except PackageNotFoundError:
        step = "install it: `pip install -e .` in the checkout"
        yield Line(what="rlhf-flows", state="warning", found="runs from a folder", next_step=step)
        said = []
    needed = [r for r in map(Requirement, said) if r.marker is None or r.marker.evaluate()]
    for requirement in needed or [Requirement(name) for name in ("torch", "ray", "prefect")]:
        yield _package(requirement, locked.get(requirement.name.lower()))


def _package(requirement: Requirement, locked: str | None) -> Line:
    name = requirement.name
    try:
        found = version(name)
    except PackageNotFoundError:
        step = f"pip install '{requirement}'"
        return Line(what=name, state="wrong", found="not installed", next_step=step)
    if not requirement.specifier.contains(found, prereleases=True):
        step = f"pip install '{requirement}'"
        return Line(what=name, state="wrong", found=found, next_step=step)
    if locked is not None and found.partition("+")[0] != locked.partition("+")[0]:
        step = f"{locked} is what was tested (locks/{_LOCK.name}): `pip install {name}=={locked}`"
        return Line(what=name, state="warning", found=found, next_step=step)
    return Line(what=name, state="ok", found=found)


def _locked() -> Iterator[tuple[str, str]]:
    for line in _LOCK.read_text("utf-8").splitlines() if _LOCK.is_file() else ():
        name, pinned, number = line.partition("==")
        if pinned and not name.startswith("#"):
            yield name.strip().lower(), number.split()[0]


def _vllm() -> Line:
    if importlib.util.find_spec("vllm") is None:
        step = "runs sample by transformers, slower: pip install 'rlhf-flows[cpu]' or [gpu]"
        return Line(what="vLLM", state="warning", found="not installed", next_step=step)
    # In a process of its own: it loads seconds of libraries, and a broken build may end it.
    command = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        step = "try `python -c 'import vllm'`"
        return Line(what="vLLM", state="warning", found="not imported after 180 s", next_step=step)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        step = "build and torch must fit: install both from one lock, or set sampler=transformers"
        return Line(what="vLLM", state="wrong", found=last, next_step=step)
    return Line(what="vLLM", state="ok", found=done.stdout.split()[-1])


def _ray(address: str | None) -> Line:
    what = "Ray head"
    if address is None:
        return Line(what=what, state="ok", found="none asked for: a run starts one of its own")
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return Line(what=what, state="ok", found=f"{address} answers")
    except (OSError, ValueError) as e:
        step = "ray start --head --port 6379, and name it as host:port"
        return Line(what=what, state="wrong", found=f"{address}: {e}", next_step=step)


def _prefect() -> Line:
    what = "Prefect server"
    if not is_server_configured():
        step = "for one whose pages stay: `prefect server start`, and set PREFECT_API_URL"
        found = "none is configured: each run starts one for itself"
        return Line(what=what, state="warning", found=found, next_step=step)
    from prefect.client.orchestration import get_client

    try:
        check_configured_server()
        with get_client(sync_client=True) as client:
            theirs, url = client.api_version(), client.api_url
    except RlhfFlowsError as e:
        step = "start it, or unset PREFECT_API_URL"
        return Line(what=what, state="wrong", found=str(e), next_step=step)
    except Exception as e:  # of whatever answers there instead
        step = "check PREFECT_API_URL and PREFECT_API_KEY"
        return Line(what=what, state="wrong", found=f"{type(e).__name__}: {e}", next_step=step)
    ours = version("prefect")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        step = f"run a server of {ours}: it has the API that this client was made for"
        found = f"{theirs} at {url}, the client is {ours}"
        return Line(what=what, state="warning", found=found, next_step=step)
    return Line(what=what, state="ok", found=f"{theirs} at {url}")


def _store(url: str) -> Line:
    what = "store"
    place = url if "://" in url and not url.startswith("file://") else str(_existing(url))
    try:
        store = open_store(place)
        probe_put_if_absent(store)
    except (RlhfFlowsError, OSError) as e:
        step = "name another one: --store FOLDER or s3://bucket/prefix (docs/store.md)"
        return Line(what=what, state="wrong", found=str(e), next_step=step)
    return Line(what=what, state="ok", found=f"{store.url} keeps put-if-absent")


def _existing(url: str) -> Path:
    """The folder of a local store, or the nearest above it that is there; of another, here."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        return Path.cwd()
    path = Path(rest if separator else url).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _gpu() -> Line:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Line(what="GPU", state="ok", found="none: runs use the CPU")
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Line(what="GPU", state="warning", found=str(e), next_step="try nvidia-smi")
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        said = (done.stdout + done.stderr).strip() or "nvidia-smi names none"
        return Line(what="GPU", state="warning", found=said[:200], next_step="check the driver")
    return Line(what="GPU", state="ok", found="; ".join(names))


def _room(what: str, folder: Path, *, wanted: int, least: int) -> Line:
    try:
        stat = os.statvfs(folder)
    except OSError as e:
        return Line(what=what, state="warning", found=str(e), next_step="check the mount")
    free = stat.f_bavail * stat.f_frsize
    found = f"{free / _GIB:.1f} GiB free in {folder}"
    if free >= wanted:
        return Line(what=what, state="ok", found=found)
    step = (
        "lower cluster.object_store_memory_bytes, or give the container more (--shm-size=4g)"
        if folder == _SHARED
        else "make room: each version is a whole model (runtime.keep_last, `rlhf-flows gc RUN`)"
    )
    state: Literal["warning", "wrong"] = "warning" if free >= least else "wrong"
    return Line(what=what, state=state, found=found, next_step=step)
