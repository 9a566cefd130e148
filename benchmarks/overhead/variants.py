"""The same episodes with one layer less each time; each variant marks the end of each episode.

flow     engine.learn(): Prefect, Ray, shards and commits in the store
ray      the phases as plain functions; pools, store as above
disk     and the workers in this process
memory   and the store in memory (tmpfs), where a sync to disk is free
plain    calls of the modules, one after another, nothing else
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.marks import mark
from benchmarks.overhead.in_process import InProcessPool
from benchmarks.overhead.modules import BenchPolicy, BenchReward, BenchTrainer
from rlhf_flows import attempt as attempts
from rlhf_flows.attempt.description import Description
from rlhf_flows.attempt.placement import connect_cluster, make_pool, open_pools
from rlhf_flows.data.batch import collate
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.services.prefect_server import prefect_api
from rlhf_flows.store import open_run, open_store, scan, take_attempt
from rlhf_flows.tasks import NoProgress, Runtime, evaluation, param_sync, rollout, scoring, training
from rlhf_flows.tasks.retention import retain

__all__ = ["run_variant"]

NUM_PROMPTS, SAMPLES, NUM_EVAL = 64, 8, 64
_MEMORY = Path("/dev/shm")


class EndOfEpisodes(NoProgress):
    """An episode ends when the samplers hold the version that it made."""

    def finished(
        self, phase: str, number: int, seconds: float, metrics: Mapping[str, float]
    ) -> None:
        if phase == "param_sync":
            mark("episode")


def _rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question number {i:05d}: " + "word " * (i % 7)} for i in range(count)]


def _engine() -> GRPOEngine:
    modules = BenchPolicy("policy"), BenchTrainer("trainer"), BenchReward("reward")
    engine = GRPOEngine(*modules, name="overhead")
    engine.set_dataset(_rows(512)).set_eval_dataset(_rows(NUM_EVAL))
    return engine


def _settings(episodes: int, url: str) -> dict[str, Any]:
    return {
        "run_name": "overhead",
        "store": {"url": url},
        "runtime": {
            "num_episode": episodes,
            "sample_per_episode": NUM_PROMPTS * SAMPLES,
            "num_inference_per_prompt": SAMPLES,
            "eval_episode_interval": 1,
        },
    }


def run_variant(name: str, episodes: int) -> None:
    """Marks the start, the end of each episode, and last where the time went, if that is known."""
    root = _MEMORY if name == "memory" else None
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-", dir=root) as folder:
        if name == "plain":
            _plain(episodes)
        elif name == "flow":
            with prefect_api() as server:
                if server is not None:
                    server.wait()
                _engine().learn(progress=EndOfEpisodes(), **_settings(episodes, folder))
        else:
            mark("parts", parts=asyncio.run(_phases(name, episodes, folder)))


async def _phases(name: str, episodes: int, folder: str) -> dict[str, float]:
    """The phases as functions, over pools of Ray actors or of workers in this process."""
    engine = _engine().configure(_settings(episodes, folder))
    checked = attempts.check(_description(engine))
    store = open_store(folder)
    open_run(store, "overhead", config={}, may_change=frozenset())
    attempt = take_attempt(store, "overhead", flow_run_id=None, changed={})

    async def run(pools: Mapping[str, Any]) -> None:
        assert checked.dataset is not None
        assert checked.eval_dataset is not None
        runtime = Runtime(
            config=checked.config,
            run="overhead",
            attempt=attempt.number,
            store=store,
            state=scan(store, "overhead"),
            pools=pools,
            environment=checked.environment,
            rollout_nodes=checked.rollout,
            scoring_nodes=checked.scoring,
            trainer=checked.trainer,
            evaluator=checked.evaluator,
            syncs=checked.syncs,
            dataset=checked.dataset.info,
            eval_dataset=checked.eval_dataset.info,
            progress=EndOfEpisodes(),
        )
        await param_sync.fn(runtime, 0)
        await evaluation.fn(runtime, 0)
        for episode in range(episodes):
            await rollout.fn(runtime, episode)
            await scoring.fn(runtime, episode)
            await training.fn(runtime, episode)
            await retain(runtime, newest=episode + 1)
            runtime.forget(episode)
            await param_sync.fn(runtime, episode + 1)
            await evaluation.fn(runtime, episode + 1)

    if name == "ray":
        cluster = await connect_cluster(checked)
        opened = open_pools(
            checked, store, "overhead", attempt.number, cluster, resumes=False, keeps=_none
        )
        async with opened as (pools, _):
            await run(pools)
        return {}
    local = {
        module: InProcessPool(make_pool(checked, store, "overhead", attempt.number, module).spec)
        for module in checked.modules
    }
    for kind, dataset in (("train", checked.dataset), ("eval", checked.eval_dataset)):
        assert dataset is not None
        for owner in dataset.owners:
            local[owner].set_dataset(kind, dataset.info.digest, list(dataset.rows))
    await run(local)
    return {
        f"{module}.{method}": seconds / episodes
        for module, pool in local.items()
        for method, seconds in pool.seconds.items()
    }


async def _none(_: BaseException) -> bool:
    return False


def _description(engine: GRPOEngine) -> Description:
    return Description(
        name=engine.name,
        config=engine.config,
        environment=engine.environment,
        trainer=engine.trainer,
        evaluator=engine.evaluator,
        syncs=tuple(engine._syncs),
        takeover=False,
        progress=None,
    )


def _plain(episodes: int) -> None:
    """What the episodes compute, written as a script would."""
    torch.set_num_threads(1)
    policy, reward, trainer = BenchPolicy("policy"), BenchReward("reward"), BenchTrainer("trainer")
    for module in (policy, reward, trainer):
        module.setup()
    dataset, held_out = policy.build_dataset(_rows(512)), policy.build_dataset(_rows(NUM_EVAL))
    mark("episode")
    for episode in range(episodes):
        first = NUM_PROMPTS * episode
        rows = [dataset[(first + i) % 512] for i in range(NUM_PROMPTS) for _ in range(SAMPLES)]
        batch = collate(rows) | {"seed": torch.arange(len(rows))}
        sampled = policy.forward_step(batch)
        samples = sampled | reward.forward_step(sampled)
        trainer.train_step([samples], episode)
        policy.load_weights(trainer.named_weights())
        questions = collate([held_out[i] for i in range(NUM_EVAL)])
        reward.eval_step(policy.eval_step(questions | {"seed": torch.arange(NUM_EVAL)}))
        mark("episode")


if __name__ == "__main__":
    run_variant(sys.argv[1], int(sys.argv[2]))
