"""A process that has imported everything, and forks one child for each attempt of a run.

A flow process spends its first seven seconds importing torch, Ray and Prefect; a campaign starts
hundreds. Nothing is started here before the fork (no Ray, no event loop, no thread of ours), so a
child is what a fresh process would be after its imports.

Reads one JSON object a line (settings, as `Campaign` makes them), forks, and answers with the
child's process id; {"wait": pid} is answered with its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import ray  # noqa: F401  imported before the fork, started after it
import torch

import rlhf_flows.attempt.running
import rlhf_flows.pools.worker  # noqa: F401
from rlhf_flows.tasks import NoProgress
from tests.chaos.kinds import KINDS
from tests.chaos.points import Points
from tests.end_to_end.whole_run import learn

torch.set_num_threads(1)
_ENGINES = {name: kind.load() for name, kind in KINDS.items()}


class _Progress(NoProgress):
    def __init__(self, points: Points) -> None:
        self.points = points

    def started(self, phase: str, number: int, total: int) -> None:
        self.points.reach(f"started {phase}")

    def advanced(self, phase: str, number: int, done: int) -> None:
        self.points.reach(f"advanced {phase}")

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        self.points.reach(f"finished {phase}")


def attempt(settings: dict[str, Any]) -> None:
    """One attempt, to its end or its death."""
    folder = Path(settings["folder"])
    points = Points("flow", folder)
    points.install()
    learn(
        _ENGINES[settings["kind"]](folder),
        settings["store"],
        settings["run"],
        address=settings["address"],
        models=settings["models"],
        progress=_Progress(points),
        **settings["runtime"],
    )


def _child(settings: dict[str, Any]) -> None:
    log = os.open(Path(settings["folder"], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        attempt(settings)
        code = 0
    except BaseException:  # SystemExit as well: nothing may unwind into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no farewell of the parent's


def main() -> None:
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(asked)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
