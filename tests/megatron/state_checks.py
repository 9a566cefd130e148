"""What ranks check of training state together; each function runs on every rank of a test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.megatron.training import MegatronTraining
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.megatron.state import MegatronState
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.checks import loaded
from tests.megatron.training_checks import SETTINGS, cut, global_batch, led_by, made

SIZES = [1, 3, 2, 1]


def state_of(training: MegatronTraining, **extra: torch.Tensor) -> MegatronState:
    model = training.model
    return MegatronState(
        decoders=model.decoders,
        shape=model.shape,
        conversion=model.conversion,
        topology=model.topology,
        optimizer=training.optimizer,
        lr_scheduler=training.lr_scheduler,
        tensors=extra,
    )


def steps(training: MegatronTraining, folder: str, which: Sequence[int]) -> list[dict[str, float]]:
    from megatron.core import parallel_state

    trainer, batch_of = made("sft", folder)
    trainer = led_by(trainer, training)
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    return [
        dict(trainer.train_step(cut(batch_of(step, trainer), SIZES)[rank::size], step))
        for step in which
    ]


def write_weights(training: MegatronTraining, file: Path) -> None:
    weights = {n: w.clone() for n, w in training.model.named_weights()}
    if torch.distributed.get_rank() == 0:
        save_file(weights, file)


def export(model: str, weights: dict[str, torch.Tensor], to: Path) -> str:
    """A folder of `model` with other weights."""
    to.mkdir(exist_ok=True)
    for file in Path(model).glob("*.json"):
        (to / file.name).write_bytes(file.read_bytes())
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def train_and_save(
    folder: str,
    topology: Topology,
    out: str,
    distributed_optimizer: bool = False,
    max_file_bytes: int = 1 << 30,
    **load: Any,
) -> dict[str, Any]:
    """Two steps, state and weights saved, a third step; its metrics, and a random number before."""
    with loaded(folder, topology, **load) as model:
        training = MegatronTraining(model, SETTINGS, distributed_optimizer=distributed_optimizer)
        steps(training, folder, [0, 1])
        weights = {n: w.clone() for n, w in model.named_weights()}
        if torch.distributed.get_rank() == 0:
            export(folder, weights, Path(out) / "weights")
            (Path(out) / "state").mkdir()
        torch.distributed.barrier()
        random.seed(torch.distributed.get_rank())
        state = state_of(training, beta=torch.tensor([0.25, 3.0]))
        state.save(Path(out) / "state", max_file_bytes=max_file_bytes)
        drawn = random.random()
        trained = {n: w.clone() for n, w in state.trained_weights()}
        if torch.distributed.get_rank() == 0:
            save_file(trained, Path(out) / "trained.safetensors")
        log = steps(training, folder, [2])
        write_weights(training, Path(out) / "after.safetensors")
    return {"log": log, "drawn": drawn}


def load_and_go_on(
    folder: str,
    topology: Topology,
    out: str,
    again: str,
    distributed_optimizer: bool = False,
    **load: Any,
) -> dict[str, Any]:
    """Weights and state of `train_and_save` into fresh ones; saved again; the third step."""
    with loaded(str(Path(out) / "weights"), topology, **load) as model:
        training = MegatronTraining(model, SETTINGS, distributed_optimizer=distributed_optimizer)
        beta = torch.zeros(2)
        state = state_of(training, beta=beta)
        names = sorted(f.name for f in (Path(out) / "state").iterdir())
        read = state.files(Path(out) / "state", names)
        # Nothing else is needed: it is taken from a folder with these alone.
        rank = torch.distributed.get_rank()
        own = Path(again) / f"fetched-{rank}"
        own.mkdir()
        for name in names:
            if name in read or name.endswith(".json"):
                (own / name).write_bytes((Path(out) / "state" / name).read_bytes())
        state.load(own)
        drawn = random.random()
        if rank == 0:
            (Path(again) / "state").mkdir()
        torch.distributed.barrier()
        state.save(Path(again) / "state")
        log = steps(training, folder, [2])
        found = {n: w.float() for n, w in model.named_weights()}
        expected = load_file(Path(out) / "after.safetensors")
        assert found.keys() == expected.keys()
        inner = [part.optimizer for part in training.optimizer.chained_optimizers]
        held = [s["step"] for optimizer in inner for s in optimizer.state.values()]
    return {
        "log": log,
        "weights": max(float((found[n] - expected[n].float()).abs().max()) for n in expected),
        "beta": beta.tolist(),
        "drawn": drawn,
        "steps": sorted({float(step) for step in held}),
        "counters_shared": len({step.data_ptr() for step in held}) < len(held),
        "read": read,
    }


def torch_goes_on(out: str, dtype: str) -> dict[str, float]:
    """The third step by the torch trainer, from the weights and the state that Megatron saved."""
    settings = SETTINGS.model_copy(update={"master_weights": dtype == "bfloat16"})
    beta = torch.zeros(2)

    class Trainer(SFTTrainer):
        def training_tensors(self) -> Mapping[str, torch.Tensor]:
            return {**super().training_tensors(), "beta": beta}

    path = Path(out) / "weights"
    trainer = Trainer("trainer", path=path, optimizer=settings, layout="padded", dtype=dtype)
    trainer.attach(ModuleContext())
    trainer.setup()
    trainer.load_state(Path(out) / "state")
    metrics = trainer.train_step(cut(global_batch(2, trainer), [3, 4]), 2)
    expected = load_file(Path(out) / "after.safetensors")
    found = dict(trainer.named_weights())
    assert found.keys() == expected.keys()
    assert beta.tolist() == [0.25, 3.0]
    return {
        "loss": metrics["loss"],
        "learning_rate": metrics["learning_rate"],
        "weights": max(
            float((found[n].float() - w.float()).abs().max()) for n, w in expected.items()
        ),
    }


def refused_state(
    folder: str, topology: Topology, out: str, extra: bool = True, **load: Any
) -> tuple[str, bool]:
    """What loading says, and whether the optimizer was left as it was."""
    with loaded(folder, topology, **load) as model:
        training = MegatronTraining(model, SETTINGS)
        tensors = {"beta": torch.zeros(2)} if extra else {}
        try:
            state_of(training, **tensors).load(Path(out) / "state")
            message = "taken"
        except ConfigError as refusal:
            message = str(refusal)
        fresh = all(not part.optimizer.state for part in training.optimizer.chained_optimizers)
    return message, fresh
