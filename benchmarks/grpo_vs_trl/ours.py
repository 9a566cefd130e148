"""One side of the comparison: `GRPOEngine` with everything a run of it does.

Prefect flow and tasks, Ray pools, vLLM, shards in Parquet on a local folder, commits, checkpoints,
param sync with its probe. A step is an episode; it ends when the sampler holds the new weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.grpo_vs_trl.work import Work, digit_share
from benchmarks.marks import mark, worker_processes
from benchmarks.options import from_command_line
from rlhf_flows.tasks import NoProgress


class Marks(NoProgress):
    """The `Progress` of a run, told to `__main__`.

    Phases follow each other here (one shard, on-policy), so each lasts from the end of the one
    before to its own.
    """

    def __init__(self) -> None:
        self._ended_s = 0.0
        self._seconds: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        now = time.perf_counter()
        self._seconds[phase] = now - self._ended_s
        self._ended_s = now
        self._metrics |= {k: metrics[k] for k in ("reward", "kl", "grad_norm") if k in metrics}
        if phase != "param_sync":
            return
        if number == 0:
            mark("processes", names=worker_processes())
        else:
            mark("step", number=number, seconds=self._seconds, metrics=self._metrics)
        self._seconds, self._metrics = {}, {}


def main(work: Work) -> None:
    from rlhf_flows.engines import GRPOEngine
    from rlhf_flows.generation import GenerationSettings
    from rlhf_flows.models.function_reward import FunctionReward
    from rlhf_flows.models.policy_trainer import PolicyTrainer
    from rlhf_flows.models.reference import Reference
    from rlhf_flows.models.vllm_policy import VLLMPolicy
    from rlhf_flows.services.prefect_server import prefect_api
    from rlhf_flows.settings import GRPOSettings, OptimizerSettings

    settings = GenerationSettings(max_new_tokens=work.new_tokens, ignore_eos=True)
    policy = VLLMPolicy(
        "policy",
        path=work.model,
        generation=settings,
        dtype=work.dtype,
        max_model_len=128,
        max_num_seqs=work.samples_per_step // work.samplers,
    )
    trainer = PolicyTrainer(
        "trainer",
        path=work.model,
        dtype=work.dtype,
        optimizer=OptimizerSettings(
            learning_rate=work.learning_rate, beta2=0.999, max_grad_norm=work.max_grad_norm
        ),
        grpo=GRPOSettings(kl_coef=work.kl_coef, aggregation="sequence"),
    )
    reference = Reference("reference", path=work.model, dtype=work.dtype)
    reward = FunctionReward("reward", function=digit_share)
    engine = GRPOEngine(policy, trainer, reward, reference, name="bench")
    engine.set_dataset(work.prompts)
    with (
        prefect_api() as server,
        tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder,
    ):
        if server is not None:
            server.wait()
        engine.learn(
            progress=Marks(),
            run_name="bench",
            store={"url": str(Path(folder, "store"))},
            runtime={
                "num_episode": work.warmup + work.steps,
                "sample_per_episode": work.samples_per_step,
                "num_inference_per_prompt": work.samples,
                "generation_batch_size": work.samples_per_step // work.samplers,
                "data_shuffle": False,
                "save_episode_interval": work.save_interval,
                "seed": work.seed,
            },
            models={
                "policy": {"num_replica": work.samplers},
                "trainer": {"num_threads": work.threads},
                "reference": {"num_threads": work.threads},
                "reward": {"num_threads": 1},
            },
        )


if __name__ == "__main__":
    main(from_command_line(Work))
