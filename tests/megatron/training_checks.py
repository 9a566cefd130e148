"""What ranks check of training together; each function runs on every rank of a test (`ranks.py`).

One stream of batches, of rows of very different lengths, is trained on by this package's trainers
on plain torch, and by the same trainers with Megatron's passes and steps in place of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.errors import NonFiniteError
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.megatron_passes import MegatronPasses
from rlhf_flows.models.megatron_training import MegatronTraining
from rlhf_flows.models.pairs import as_samples
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.megatron_topology import Topology
from rlhf_flows.settings import GRPOSettings, OptimizerSettings
from tests.megatron.checks import loaded

NUM_STEPS = 3
SETTINGS = OptimizerSettings(
    learning_rate=1e-3,
    weight_decay=0.1,
    # AdamW divides small gradients by their size: with its usual 1e-8 those that are nearly zero
    # move weights by what their rounding says.
    eps=1e-6,
    max_grad_norm=0.3,
    schedule="cosine",
    warmup_steps=1,
    total_steps=4,
)


def global_batch(step: int, trainer: SFTTrainer) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    lengths = [(3, 9), (1, 2), (20, 1), (7, 16), (2, 5), (11, 3), (4, 25)]
    batch: Batch = {
        "prompt_ids": [torch.randint(200, (p,), generator=g) for p, _ in lengths],
        "response_ids": [torch.randint(200, (r,), generator=g) for _, r in lengths],
    }
    batch["prompt_ids"][0][1] = 0  # the padding token, whose embedding learns from the head alone
    return trainer.prepare_batch(batch)


def group_batch(step: int, trainer: PolicyTrainer) -> Batch:
    """Three groups of siblings, with rewards and logprobs of a reference."""
    g = torch.Generator().manual_seed(200 + step)
    batch: Batch = {"prompt_ids": [], "response_ids": []}
    for prompt_length, responses in ((6, (3, 14, 8)), (2, (1, 9)), (15, (4, 4))):
        prompt = torch.randint(200, (prompt_length,), generator=g)
        batch["prompt_ids"] += [prompt] * len(responses)
        batch["response_ids"] += [torch.randint(200, (r,), generator=g) for r in responses]
    batch["group"] = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    batch["reward"] = torch.rand(7, generator=g)
    batch["reference_logprobs"] = [
        torch.rand(len(r), generator=g) - 6.0 for r in batch["response_ids"]
    ]
    return trainer.prepare_batch(batch)


def pair_batch(step: int, trainer: DPOTrainer) -> Batch:
    g = torch.Generator().manual_seed(300 + step)

    def texts(*lengths: int) -> list[torch.Tensor]:
        return [torch.randint(200, (length,), generator=g) for length in lengths]

    return trainer.prepare_batch(
        {
            "prompt_ids": texts(3, 9, 1, 12, 5, 2, 7),
            "chosen_ids": texts(4, 12, 6, 2, 9, 20, 3),
            "rejected_ids": texts(8, 3, 5, 11, 1, 2, 6),
            "reference_chosen_logprob": -50 * torch.rand(7, generator=g),
            "reference_rejected_logprob": -50 * torch.rand(7, generator=g),
        }
    )


def made(algorithm: str, folder: str) -> tuple[Any, Callable[[int, Any], Batch]]:
    """A trainer on padded rows, and what makes its batches, of seven rows each."""
    common: dict[str, Any] = {"path": folder, "optimizer": SETTINGS, "layout": "padded"}
    if algorithm == "grpo":
        settings = GRPOSettings(kl_coef=0.1, exact_entropy=True, temperature=0.9)
        return PolicyTrainer("trainer", grpo=settings, **common), group_batch
    if algorithm == "dpo":
        return DPOTrainer("trainer", **common), pair_batch
    return SFTTrainer("trainer", **common), global_batch


def cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        parts.append(select(batch, list(range(start, start + size))))
        start += size
    assert start == batch_size(batch)
    return parts


def led_by(trainer: Any, training: MegatronTraining) -> Any:
    """A trainer of this package whose passes and steps are Megatron's."""
    for method in ("logprobs_of", "backward_all", "optimizer_step"):
        trainer.__dict__[method] = getattr(training, method)
    if isinstance(trainer, DPOTrainer):
        trainer.__dict__["backward_all"] = partial(training.backward_all, samples_of=as_samples)
    return trainer


def plain_training(algorithm: str, folder: str, weights_file: str) -> list[dict[str, float]]:
    trainer, batch_of = made(algorithm, folder)
    trainer.attach(ModuleContext())
    trainer.setup()
    log = []
    for step in range(NUM_STEPS):
        metrics = trainer.train_step(cut(batch_of(step, trainer), [3, 4]), step)
        log.append(dict(metrics))
    save_file({n: w.contiguous() for n, w in trainer.named_weights()}, weights_file)
    return log


def megatron_training(
    folder: str,
    topology: Topology,
    sizes: Sequence[int],
    weights_file: str,
    algorithm: str = "sft",
    distributed_optimizer: bool = False,
    **load: Any,
) -> dict[str, Any]:
    """The log of each step, and how far the weights are from those of the file in the end."""
    from megatron.core import parallel_state

    with loaded(folder, topology, **load) as model:
        start = {n: w.clone() for n, w in model.named_weights()}
        training = MegatronTraining(model, SETTINGS, distributed_optimizer=distributed_optimizer)
        trainer, batch_of = made(algorithm, folder)
        trainer = led_by(trainer, training)
        rank, size = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        log = []
        for step in range(NUM_STEPS):
            mine = cut(batch_of(step, trainer), sizes)[rank::size]
            log.append(dict(trainer.train_step(mine, step)))
        found = {n: w.float() for n, w in model.named_weights()}
    expected = load_file(weights_file)
    assert found.keys() == expected.keys()
    return {
        "log": log,
        "weights": max(float((found[n] - expected[n]).abs().max()) for n in expected),
        "moved": min(float((expected[n] - start[n].float()).abs().max()) for n in expected),
    }


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
