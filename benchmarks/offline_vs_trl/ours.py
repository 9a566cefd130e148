"""One side of the comparison: `SFTEngine`, `RewardModelEngine` or `DPOEngine`, all of a run.

Prefect flow and tasks, Ray pools, shards in Parquet on a local folder, commits, full checkpoints;
for DPO the reference's pass over every pair. An episode ends with its commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.marks import mark, worker_processes
from benchmarks.offline_vs_trl.work import Work
from benchmarks.options import from_command_line
from rlhf_flows.tasks import NoProgress

if TYPE_CHECKING:
    from rlhf_flows.engine import Engine


class Marks(NoProgress):
    """The `Progress` of a run, told to `__main__`."""

    def __init__(self, num_episode: int) -> None:
        self._num_episode = num_episode
        self._seconds: dict[str, float] = {}

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if phase != "training" or number >= self._num_episode:
            return
        if number == 0:
            mark("processes", names=worker_processes())
        named = {"rows_trained": "rows"}
        kept = ("loss", "grad_norm", "tokens", "rows_trained")
        found = {named.get(k, k): metrics[k] for k in kept if k in metrics}
        mark("step", number=number, seconds=self._seconds, metrics=found)
        self._seconds = {}


def build_engine(work: Work) -> Engine:
    from rlhf_flows.engines import DPOEngine, RewardModelEngine, SFTEngine
    from rlhf_flows.models.dpo_trainer import DPOTrainer
    from rlhf_flows.models.preference_reference import PreferenceReference
    from rlhf_flows.models.reward_trainer import RewardTrainer
    from rlhf_flows.models.sft_trainer import SFTTrainer
    from rlhf_flows.settings import DPOSettings, OptimizerSettings

    optimizer = OptimizerSettings(
        learning_rate=work.learning_rate, beta2=0.999, max_grad_norm=work.max_grad_norm
    )
    if work.what == "sft":
        sft = SFTTrainer("trainer", path=work.model, dtype=work.dtype, optimizer=optimizer)
        return SFTEngine(sft, name="bench")
    if work.what == "reward":
        reward = RewardTrainer("trainer", path=work.model, dtype=work.dtype, optimizer=optimizer)
        return RewardModelEngine(reward, name="bench")
    dpo = DPOSettings(beta=work.beta)
    return DPOEngine(
        PreferenceReference("reference", path=work.model, dtype=work.dtype, dpo=dpo),
        DPOTrainer("trainer", path=work.model, dtype=work.dtype, optimizer=optimizer, dpo=dpo),
        name="bench",
    )


def main(work: Work) -> None:
    from rlhf_flows.services.prefect_server import prefect_api

    counted = work.warmup + work.episodes
    models = {"trainer": {"num_threads": work.threads}}
    if work.what == "dpo":
        models["reference"] = {"num_threads": work.threads}
    engine = build_engine(work).set_dataset(work.rows)
    with (
        prefect_api() as server,
        tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder,
    ):
        if server is not None:
            server.wait()
        engine.learn(
            progress=Marks(counted),
            run_name="bench",
            store={"url": str(Path(folder, "store"))},
            runtime={
                # The reference is an episode ahead of the trainer. With one episode more, which is
                # not counted, it works as much between the readings of the clock as it is to.
                "num_episode": counted + (work.what == "dpo"),
                "sample_per_episode": work.rows_per_episode,
                "train_global_batch_size": work.batch,
                "data_shuffle": False,
                "save_episode_interval": work.save_interval,
                "seed": work.seed,
            },
            models=models,
        )


if __name__ == "__main__":
    main(from_command_line(Work))
