"""How a measured command says how far it is: lines of its output, read by `CpuTree`'s owner."""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["mark", "read_mark", "worker_processes"]

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


def worker_processes() -> dict[int, str]:
    """Process id of each pool's workers."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    workers = {a["name"]: ray.get_actor(a["name"], a["namespace"]) for a in actors}
    states: list[Any] = ray.get([w.state.remote() for w in workers.values()])
    return {state.pid: name for name, state in zip(workers, states, strict=True)}
