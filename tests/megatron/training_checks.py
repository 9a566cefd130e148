"""What ranks check of training together; each function runs on every rank of a test (`ranks.py`).

One stream of batches, of rows of very different lengths, is trained on by this package's trainers
on plain torch, and by the same trainers with Megatron's passes and steps in place of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.errors import NonFiniteError
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.logprob_head import ScoredTokens
from rlhf_flows.models.megatron.passes import MegatronPasses
from rlhf_flows.models.megatron.rows import all_logprobs
from rlhf_flows.models.megatron.scalar import with_ends
from rlhf_flows.models.megatron.training import MegatronTraining
from rlhf_flows.models.pairs import as_samples
from rlhf_flows.models.reward_trainer import RewardTrainer
from rlhf_flows.models.scalar_module import ScalarModule
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.models.value_scale import take_off
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.checks import loaded
from tests.megatron.training_streams import NUM_STEPS, SETTINGS, global_batch, made


def cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        parts.append(select(batch, list(range(start, start + size))))
        start += size
    assert start == batch_size(batch)
    return parts


class OnMegatron:
    """Beside a trainer of this package: its passes and steps are Megatron's."""

    training: MegatronTraining
    samples_of: Callable[[Batch], Batch]
    micro_batch_tokens: int
    shares_prompts = False

    @property
    def data_parallel_rank(self) -> int:
        from megatron.core import parallel_state

        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_parallel_size(self) -> int:
        from megatron.core import parallel_state

        return int(parallel_state.get_data_parallel_world_size())

    def logprobs_of(self, data: Batch, **kwargs: Any) -> ScoredTokens:
        return self.training.logprobs_of(data, **kwargs)

    def scores_of(self, data: Batch) -> torch.Tensor:
        return self.training.scores_of(data)

    def last_scores_of(self, data: Batch) -> torch.Tensor:
        return self.training.last_scores_of(data)

    def all_logprobs(self, data: Batch, *, temperature: float) -> list[torch.Tensor]:
        passes, tokens = self.training.passes, self.micro_batch_tokens
        return all_logprobs(passes, data, temperature=temperature, micro_batch_tokens=tokens)

    def backward_all(self, data: Sequence[Batch], loss_of: Any) -> list[Any]:
        return self.training.backward_all(data, loss_of, samples_of=self.samples_of)

    def optimizer_step(self, sums: torch.Tensor) -> Any:
        return self.training.optimizer_step(sums)


def led_by(trainer: Any, training: MegatronTraining) -> Any:
    """A trainer of this package on Megatron; as many ranks as there are share its batches."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trainer.attach(ModuleContext(rank=rank, world_size=size))
    trainer.__class__ = type("Led", (OnMegatron, type(trainer)), {})
    trainer.training, trainer.samples_of = training, lambda data: data
    if isinstance(trainer, DPOTrainer):
        trainer.samples_of = as_samples
    if isinstance(trainer, RewardTrainer):
        trainer.samples_of = lambda data: with_ends(as_samples(data))
    return trainer


def batches(trainer: Any, batch_of: Callable[[int, Any], Batch]) -> Iterator[Batch]:
    """Of an episode of several updates: with old logprobs, where the trainer wants these."""
    if trainer.wants_episode(NUM_STEPS):
        prepared = [batch_of(step, trainer) for step in range(NUM_STEPS)]
        yield from trainer.before_updates(prepared)
    else:
        for step in range(NUM_STEPS):
            yield batch_of(step, trainer)


def plain_training(algorithm: str, folder: str, weights_file: str) -> list[dict[str, float]]:
    trainer, batch_of = made(algorithm, folder)
    trainer.attach(ModuleContext())
    trainer.setup()
    log = []
    for step, batch in enumerate(batches(trainer, batch_of)):
        log.append(dict(trainer.train_step(cut(batch, [3, 4]), step)))
    save_file({n: w.contiguous() for n, w in of_the_model(trainer.named_weights())}, weights_file)
    return log


def megatron_training(
    folder: str,
    topology: Topology,
    weights_file: str,
    sizes: Sequence[int] | None = None,
    algorithm: str = "sft",
    distributed_optimizer: bool = False,
    micro_batch_tokens: int = 4096,
    **load: Any,
) -> dict[str, Any]:
    """The log of each step, and how far the weights are from those of the file in the end.

    Rows are cut by `sizes` and dealt in turn; without, as the trainer itself cuts and deals them.
    """
    trainer, batch_of = made(algorithm, folder)
    if isinstance(trainer, ScalarModule):
        load["head_init"] = trainer.head_init
    with loaded(folder, topology, **load) as model:
        start = {n: w.clone() for n, w in model.named_weights()}
        training = MegatronTraining(model, SETTINGS, distributed_optimizer=distributed_optimizer)
        trainer = led_by(trainer, training)
        trainer.micro_batch_tokens = micro_batch_tokens
        rank, size = trainer.data_parallel_rank, trainer.data_parallel_size
        log, rows = [], []
        for step, batch in enumerate(batches(trainer, batch_of)):
            mine = trainer.micro_batches(batch) if sizes is None else cut(batch, sizes)[rank::size]
            rows.append([batch_size(part) for part in mine])
            log.append(dict(trainer.train_step(mine, step)))
        found = {n: w.float() for n, w in model.named_weights()}
    expected = load_file(weights_file)
    assert found.keys() == expected.keys()
    return {
        "log": log,
        "rows": rows,
        "weights": max(float((found[n] - expected[n]).abs().max()) for n in expected),
        "moved": min(float((expected[n] - start[n].float()).abs().max()) for n in expected),
    }


def of_the_model(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Without the statistics that travel with those of a value model."""
    return take_off(weights, {})


def megatron_logprobs(folder: str, topology: Topology, sizes: Sequence[int]) -> dict[str, Any]:
    """Largest differences of logprobs and entropies from the plain module's, per temperature."""
    sft = SFTTrainer(path=folder, layout="padded")
    sft.attach(ModuleContext())
    sft.setup()
    batch = global_batch(0, sft)
    found: dict[str, Any] = {}
    with loaded(folder, topology) as model:
        for temperature in (1.0, 0.7):
            with torch.no_grad():
                expected = sft.logprobs_of(batch, temperature=temperature, entropy=True)
            scored = MegatronPasses(model).response_logprobs(
                cut(batch, sizes), temperature=temperature, entropy=True
            )
            for what in ("logprobs", "entropy"):
                whole = torch.cat([getattr(part, what) for part in scored])
                found[f"{what} at {temperature}"] = float(
                    (whole - getattr(expected, what)).abs().max()
                )
    return found


def step_that_is_not_finite(folder: str, topology: Topology) -> dict[str, Any]:
    with loaded(folder, topology) as model:
        before = {n: w.clone() for n, w in model.named_weights()}
        training = MegatronTraining(model, SETTINGS)
        sft = led_by(SFTTrainer(path=folder), training)
        batch = cut(global_batch(0, sft), [3, 4])
        worse = [
            {**part, "token_weight": [w * float("nan") for w in part["token_weight"]]}
            for part in batch
        ]
        try:
            sft.train_step(worse, 0)
            message = "taken"
        except NonFiniteError as refusal:
            message = str(refusal)
        unchanged = all(torch.equal(before[n], w) for n, w in model.named_weights())
        num_steps = training.lr_scheduler.num_steps
        sft.train_step(batch, 0)
    return {"message": message, "unchanged": unchanged, "num_steps": num_steps}


def dtypes_of_the_optimizer(folder: str, topology: Topology) -> set[str]:
    """Of what it steps, for a model in bfloat16."""
    with loaded(folder, topology, dtype="bfloat16") as model:
        assert {p.dtype for d in model.decoders for p in d.parameters()} == {torch.bfloat16}
        training = MegatronTraining(model, SETTINGS, distributed_optimizer=True)
        groups = training.optimizer.param_groups
        return {str(p.dtype) for group in groups for p in group["params"]}
