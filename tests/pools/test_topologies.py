"""The same training on other numbers of ranks and threads: not the same bits, and how far apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_flows.data import to_arrow
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.pools import Pool, TrainRows
from rlhf_flows.settings import OptimizerSettings
from tests.models.test_policy_trainer import episode
from tests.pools.specs import spec_of, train_call

EPISODES = 4
OFF_BY_MOST = 1e-4
"""Of the length of the way that the weights went; docs/store.md states it."""


async def weights_after(folder: Path, model: Path, *, ranks: int, threads: int) -> Any:
    optimizer = OptimizerSettings(learning_rate=1e-3)
    module = PolicyTrainer(path=model, optimizer=optimizer, micro_batch_tokens=40)
    context = ModuleContext(seed=3, num_threads=threads)
    spec = spec_of(
        module,
        folder,
        run=folder.name,
        context=context,
        num_threads=threads,
        ranks_per_replica=ranks,
    )
    pool = Pool(spec=spec, attempt=1, setup_timeout_s=120, max_restarts=0)
    try:
        await pool.open()
        metrics = []
        for number in range(EPISODES):
            rows = (TrainRows(shard=0, rows=tuple(range(20))),)
            call = train_call(number, 0, rows=rows, shards=((0, 1),), num_updates=1)
            table = to_arrow(episode(seed=number))
            metrics.append(await pool.call("train", call, table, what="a step", timeout_s=120))
            pool.tell(pool.replicas[0], "committed", number + 1)
        what = "a checkpoint"
        record = await pool.call("checkpoint", 1, EPISODES, False, what=what, timeout_s=60)
    finally:
        pool.release()
    return metrics, _flat(load_file(folder / record.weights.prefix / "model.safetensors"))


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.slow  # three pools, one after the other
@pytest.mark.usefixtures("ray_head")
async def test_other_topologies_train_to_the_same_weights_within_the_stated_tolerance(
    tmp_path: Path,
) -> None:
    model = build_tiny_qwen2(tmp_path / "model", hidden_size=64, num_layers=2)
    start = _flat(load_file(model / "model.safetensors"))
    metrics, alone = await weights_after(tmp_path / "alone", model, ranks=1, threads=1)
    way = (alone - start).norm()
    assert way > 0.1
    for ranks, threads in ((2, 1), (1, 2)):
        name = f"{ranks}-{threads}"
        theirs, other = await weights_after(tmp_path / name, model, ranks=ranks, threads=threads)
        off = float((other - alone).norm() / way)
        print(f"{ranks} ranks of {threads} threads: off by {off:.1e} of the way")
        assert off < OFF_BY_MOST
        for mine, its in zip(metrics, theirs, strict=True):
            assert its["loss"] == pytest.approx(mine["loss"], rel=1e-4, abs=1e-6)
            assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
