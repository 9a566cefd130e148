"""What ranks check of sharing a batch; each function runs on every rank of a test (`ranks.py`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_flows.data.batch import batch_size, select
from rlhf_flows.models.megatron.training import MegatronTraining
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.checks import loaded
from tests.megatron.training_checks import led_by
from tests.megatron.training_streams import NUM_STEPS, SETTINGS, made


class CollectivesCounted(TorchDispatchMode):
    """Calls of torch.distributed by their names, those of backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def steps(
    folder: str,
    algorithm: str,
    num_rows: int,
    micro_batches: dict[str, int],
    topology: Topology | None = None,
) -> dict[str, Any]:
    """Three steps on the first rows of each batch, which ranks cut and deal themselves as the
    runtime section of `micro_batches` says: on Megatron, or without a topology on torch's data
    parallel ranks. Beside them one process alone, with all rows in one pass.
    """
    alone, batch_of = made(algorithm, folder)
    alone.attach(ModuleContext())
    alone.setup()
    expected = []
    for step in range(NUM_STEPS):
        batch = first_rows(batch_of, step, alone, num_rows)
        expected.append(dict(alone.train_step([batch], step)))
    weights = dict(alone.named_weights())

    trainer, _ = made(algorithm, folder)
    if topology is None:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        trainer.attach(ModuleContext(rank=rank, world_size=size))
        trainer.setup()
        found = _trained(trainer, batch_of, num_rows, micro_batches)
        own = dict(trainer.named_weights())
    else:
        load = {"head_init": trainer.head_init} if hasattr(trainer, "head_init") else {}
        with loaded(folder, topology, **load) as model:
            led = led_by(trainer, MegatronTraining(model, SETTINGS))
            found = _trained(led, batch_of, num_rows, micro_batches)
            own = dict(model.named_weights())
    distance = max(float((own[n] - weights[n]).abs().max()) for n in weights)
    return {**found, "expected": expected, "weights": distance}


def _trained(
    trainer: Any, batch_of: Any, num_rows: int, micro_batches: dict[str, int]
) -> dict[str, Any]:
    trainer.attach(replace(trainer.context, runtime_args=micro_batches))
    log, parts, counted = [], [], CollectivesCounted()
    for step in range(NUM_STEPS):
        mine = trainer.micro_batches(first_rows(batch_of, step, trainer, num_rows))
        parts.append([batch_size(part) for part in mine])
        with counted:
            log.append(dict(trainer.train_step(mine, step)))
    return {"log": log, "parts": parts, "calls": dict(counted.calls)}


def first_rows(batch_of: Any, step: int, trainer: PolicyTrainer, num_rows: int) -> Any:
    """Prepared again, as a batch of so many rows."""
    return trainer.prepare_batch(select(batch_of(step, trainer), list(range(num_rows))))
