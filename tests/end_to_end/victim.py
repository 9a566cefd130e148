"""A toy run that kills (or stops) itself at a named point: `python victim.py '{"die": …}'`.

Points are the events of a run's progress ("advanced rollout 1 2": two shards of episode 1 are
sampled) and the instants around durable effects that no event shows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_flows.tasks import NoProgress, training
from tests.end_to_end.whole_run import learn, toy_engine

SIGNAL = signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), SIGNAL)


class Bomb(NoProgress):
    def __init__(self, point: str) -> None:
        self.point = point

    def _reach(self, *event: object) -> None:
        if " ".join(map(str, event)) == self.point:
            die()

    def started(self, phase: str, number: int, total: int) -> None:
        self._reach("started", phase, number)

    def advanced(self, phase: str, number: int, done: int) -> None:
        # "At least": what an earlier attempt had in flight may have landed already.
        for landed in range(done + 1):
            self._reach("advanced", phase, number, landed)

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        self._reach("finished", phase, number)


def around_commit(point: str) -> None:
    """Dies right before or right after the commit of an episode's training."""
    module = sys.modules[training.__module__]
    commit_json = module.commit_json

    def dying(store: Any, key: str, payload: Any) -> Any:
        name = f"commit {payload['episode']}"
        if point == f"before {name}":
            die()
        commit = commit_json(store, key, payload)
        if point == f"after {name}":
            die()
        return commit

    module.commit_json = dying  # type: ignore[attr-defined]


def main(settings: dict[str, Any]) -> None:
    global SIGNAL
    SIGNAL = signal.Signals[settings["signal"]]
    point = settings["die"]
    around_commit(point)
    engine = toy_engine(
        log=Path(settings["log"]),
        slow_s=settings["slow_s"],
        ends=settings["ends"],
        reference_ema=settings["reference_ema"],
    )
    for store, run in settings["first"]:
        learn(toy_engine(), store, run, address=settings["address"], **settings["runtime"])
    learn(
        engine,
        settings["store"],
        settings["run"],
        address=settings["address"],
        models=settings["models"],
        progress=Bomb(point),
        **settings["runtime"],
    )
    print(f"finished at {time.time()}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
