"""How a measured command says how far it is: lines of its output, read by `CpuTree`'s owner."""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["mark", "read_mark"]

_MARK = "BENCH "


def mark(kind: str, **data: Any) -> None:
    """Says that something happened now."""
    os.write(1, f"{_MARK}{json.dumps({'kind': kind, **data})}\n".encode())


def read_mark(line: str) -> dict[str, Any] | None:
    """What a line of output says, if it is a mark."""
    if not line.startswith(_MARK):
        return None
    found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return found
