"""One attempt of a run of many small shards: kills itself after so many, or goes on and says when.

python -m benchmarks.resume.run FOLDER SHARDS
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.marks import mark
from benchmarks.overhead.modules import BenchPolicy, BenchReward, BenchTrainer
from benchmarks.resume.__main__ import ROWS_PER_SHARD
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.tasks import NoProgress

MORE = 4
"""Shards that the second attempt finds missing."""


class _Progress(NoProgress):
    def __init__(self, shards: int, *, first: bool) -> None:
        self.shards, self.first = shards, first

    def begin(self, run: str, num_episode: int) -> None:
        mark("began", at=time.time())

    def started(self, phase: str, number: int, total: int) -> None:
        mark("ready", at=time.time())

    def advanced(self, phase: str, number: int, done: int) -> None:
        if phase != "rollout":
            return
        if self.first and done >= self.shards:
            mark("killed", at=time.time())
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.first and done > self.shards:
            mark("shard", at=time.time())
            os._exit(0)  # the rest is not what is measured; pools end with their head


def main(folder: str, shards: int) -> None:
    first = not Path(folder, "store").exists()
    engine = GRPOEngine(BenchPolicy("policy"), BenchTrainer("trainer"), BenchReward("reward"))
    engine.set_dataset([{"prompt": f"question {i}"} for i in range(64)])
    engine.learn(
        run_name="resume",
        store={"url": str(Path(folder, "store"))},
        cluster={"address": os.environ.get("BENCH_RAY_ADDRESS")},
        progress=_Progress(shards, first=first),
        runtime={
            "num_episode": 1,
            "sample_per_episode": ROWS_PER_SHARD * (shards + MORE),
            "num_inference_per_prompt": ROWS_PER_SHARD,
            "generation_batch_size": ROWS_PER_SHARD,
            "train_global_batch_size": ROWS_PER_SHARD * (shards + MORE),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
