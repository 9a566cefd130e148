"""What ranks check of the ready-made trainers on Megatron; each function runs on every rank.

A role is driven as its worker drives it: attached, set up, given whole global batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import SyncError
from rlhf_flows.models.backends import on_backend
from rlhf_flows.models.megatron.causal_lm import load_megatron_causal_lm
from rlhf_flows.models.megatron.training import MegatronTraining
from rlhf_flows.modules import MegatronModule
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.settings import BackendSettings
from tests.megatron.training_checks import batches, of_the_model
from tests.megatron.training_streams import SETTINGS, made

BUDGET = 24
"""Tokens of a micro-batch: of seven uneven rows, several."""


@contextmanager
def role(algorithm: str, folder: str, **backend: Any) -> Iterator[Any]:
    """A trainer of this rank, set up, and what makes its batches."""
    plain, batch_of = made(algorithm, folder)
    kind = type(plain)
    asked = inspect.signature(kind.__init__).parameters
    settings = {
        n: getattr(plain, n) for n in ("sft", "grpo", "dpo", "ppo", "settings") if n in asked
    }
    trainer: Any = on_backend(
        kind,
        "trainer",
        backend=BackendSettings(backend="megatron", **backend),
        path=folder,
        optimizer=plain.optimizer_settings,
        micro_batch_tokens=BUDGET,
        **settings,
    )
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trainer.attach(ModuleContext(rank=rank, world_size=world_size))
    trainer.validate()
    trainer.setup()
    try:
        yield trainer, batch_of
    finally:
        trainer.groups.close()


def role_training(
    algorithm: str, folder: str, weights_file: str, backend: dict[str, Any]
) -> dict[str, Any]:
    """As `training_checks.megatron_training`, of whole batches that the role cuts itself."""
    with role(algorithm, folder, **backend) as (trainer, batch_of):
        start = {n: w.clone() for n, w in trainer.named_weights()}
        log = []
        for step, batch in enumerate(batches(trainer, batch_of)):
            log.append(dict(trainer.train_step(trainer.micro_batches(batch), step)))
        found = {n: w.float() for n, w in of_the_model(trainer.named_weights())}
        place = trainer.data_parallel_rank, trainer.data_parallel_size
    expected = load_file(weights_file)
    assert found.keys() == expected.keys()
    return {
        "log": log,
        "place": place,
        "weights": max(float((found[n] - expected[n]).abs().max()) for n in expected),
        "moved": min(float((expected[n] - start[n].float()).abs().max()) for n in expected),
    }


def weights_given_back(algorithm: str, folder: str, backend: dict[str, Any]) -> dict[str, Any]:
    """After a step the weights of the start are loaded again; then some that do not fit."""
    with role(algorithm, folder, **backend) as (trainer, batch_of):
        start = {n: w.clone() for n, w in trainer.named_weights()}
        trainer.train_step(trainer.micro_batches(batch_of(0, trainer)), 0)
        trained = {n: w.clone() for n, w in trainer.named_weights()}
        messages = []
        first, *_, last = start
        for wrong in (
            {n: w for n, w in start.items() if n != last},
            {**start, "another": start[first]},
            {**start, first: start[first].T.contiguous()},
            {**start, last: start[last].double()},
        ):
            try:
                trainer.load_weights(iter(wrong.items()))
                messages.append("taken")
            except SyncError as refusal:
                messages.append(str(refusal))
        untouched = all(torch.equal(trained[n], w) for n, w in trainer.named_weights())
        trainer.load_weights(iter(start.items()))
        back = all(torch.equal(start[n], w) for n, w in trainer.named_weights())
        # The optimizer steps the weights that came, not those it had.
        trainer.train_step(trainer.micro_batches(batch_of(0, trainer)), 0)
        near = max(float((start[n] - w).abs().max()) for n, w in trainer.named_weights())
    return {
        "moved": any(not torch.equal(start[n], trained[n]) for n in start),
        "untouched": untouched,
        "back": back,
        "near": near,
        "messages": messages,
    }


def probed(folder: str, sequences: list[list[int]], backend: dict[str, Any]) -> Any:
    with role("sft", folder, **backend) as (trainer, _):
        return trainer.probe_logprobs(sequences), trainer.vocabulary_size()


def statistics_given_back(folder: str, backend: dict[str, Any]) -> dict[str, Any]:
    """Of a normalized value's returns: what was sent after a batch, and what is taken back."""
    with role("value, normalized", folder, **backend) as (trainer, batch_of):
        start = {n: w.clone() for n, w in trainer.named_weights() if n.startswith("value_norm.")}
        whole = {n: w.clone() for n, w in trainer.named_weights()}
        batch_of(0, trainer)  # its returns are taken in
        seen = {n: w.clone() for n, w in trainer.named_weights() if n in start}
        trainer.load_weights(iter(whole.items()))
        back = {n: w for n, w in trainer.named_weights() if n in start}
        trained = [n for n, _ in trainer.trained_weights()]
    return {
        "names": sorted(start),
        "moved": any(not torch.equal(start[n], seen[n]) for n in start),
        "back": all(torch.equal(start[n], back[n]) for n in start),
        "trained": trained == list(whole),
    }


class OwnTrainer(MegatronModule):
    """As docs/megatron.md writes one."""

    def __init__(self, folder: str) -> None:
        super().__init__("own")
        self.path = Path(folder)

    def setup(self) -> None:
        topology = self.topology()
        self.make_groups(topology)
        self.use_part(load_megatron_causal_lm(self.path, topology), folder=self.path)
        self.training = MegatronTraining(self.part, SETTINGS)
        self.optimizer, self.lr_scheduler = self.training.optimizer, self.training.lr_scheduler

    def train_step(self, data: list[Batch], iteration: int) -> dict[str, float]:
        beside = self.training.backward_all(data, self.loss)
        sums, metrics = self.training.optimizer_step(sum(beside))
        return {"loss": float(sums[0]), **metrics}

    def loss(self, data: Batch) -> tuple[Any, Any]:
        logprobs = self.training.logprobs_of(data, temperature=1.0).logprobs
        loss = -logprobs.sum() / 4096
        return loss, loss.detach()[None].double()


def own_module(folder: str, out: str) -> dict[str, Any]:
    """Trained, saved, and gone on with in a module that is made anew."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    context = ModuleContext(
        rank=rank, world_size=world_size, module_args={"tensor_model_parallel_size": 2}
    )
    _, batch_of = made("sft", folder)
    plain = made("sft", folder)[0]
    data = [batch_of(0, plain)]
    state = Path(out) / "state"
    (state / str(rank)).mkdir(parents=True)

    def module() -> OwnTrainer:
        own = OwnTrainer(folder)
        own.attach(context)
        own.setup()
        return own

    first = module()
    losses = [first.train_step(data, 0)["loss"]]
    first.save_state(state / str(rank))
    if rank == 0:
        (Path(out) / "export").mkdir()
    first.save_pretrained(Path(out) / "export")
    weights = {n: w.clone() for n, w in first.named_weights()}
    losses.append(first.train_step(data, 1)["loss"])
    after = {n: w.clone() for n, w in first.named_weights()}
    first.groups.close()
    torch.distributed.barrier()
    for other in state.glob("*/*"):  # as a run brings all files to every rank
        if other.parent.name != str(rank):
            (state / str(rank) / other.name).write_bytes(other.read_bytes())
    again = module()
    again.load_weights(iter(weights.items()))
    again.load_state(state / str(rank))
    losses.append(again.train_step(data, 1)["loss"])
    same = all(torch.equal(after[n], w) for n, w in again.named_weights())
    again.groups.close()
    return {"losses": losses, "same": same, "place": again.part.topology.data_parallel}
