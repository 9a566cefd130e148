"""This package's trainers on models of `decoders.py`, by torch and by Megatron: what is measured.

The decision here: steps, losses, optimizers and logprob passes are those of the package, unchanged;
only where the model comes from is another. Megatron is driven by `MegatronTraining` in place of a
trainer's own passes. Float32 masters are kept for bfloat16 weights on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.arithmetic import Text
from benchmarks.decoders import build_megatron, build_torch
from rlhf_flows.data.batch import Batch, select
from rlhf_flows.data.packing import cut_by_tokens
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.settings import OptimizerSettings

__all__ = ["Learner", "MegatronLearner", "TorchLearner", "batch_of", "mixed_texts"]

SETTINGS = OptimizerSettings(learning_rate=1e-5, max_grad_norm=1.0)
_NOWHERE = Path("no-folder")


class Learner(Protocol):
    def step(self, batch: Batch) -> Mapping[str, float]:
        """One optimizer step; metrics of it."""

    def logprobs(self, batch: Batch) -> list[Tensor]:
        """Without gradient; on the CPU."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...

    def use(self, *, micro_batch_tokens: int, recompute: bool) -> None:
        """From the next step on."""


class TorchLearner:
    """`SFTTrainer`, or `PolicyTrainer` for batches with rewards."""

    def __init__(
        self,
        shape: DecoderShape,
        *,
        algorithm: str = "sft",
        dtype: torch.dtype,
        device: str = "cpu",
        micro_batch_tokens: int,
        recompute: bool = False,
        layout: Any = "auto",
        num_threads: int = 1,
        rank: int = 0,
        world_size: int = 1,
        weights: HFFolder | None = None,
    ) -> None:
        from rlhf_flows.models.adamw import Schedule, make_adamw, make_masters
        from rlhf_flows.models.lanes import Lanes

        self.device = device
        self.trainer = _trainer(algorithm, layout=layout, tokens=micro_batch_tokens)
        context = ModuleContext(
            device=device, num_threads=num_threads, rank=rank, world_size=world_size
        )
        self.trainer.attach(context)
        model = build_torch(shape, dtype=dtype, device=device, recompute=recompute)
        self.trainer.model = model
        if weights is not None:
            self.trainer.load_weights((n, w.to(dtype)) for n, w in _read(weights))
        self.trainer.lanes = Lanes(model, num_threads=num_threads, device=device)
        if dtype != torch.float32:
            self.trainer.master_weights = make_masters(model)
        self.trainer.optimizer = make_adamw(model, SETTINGS, self.trainer.master_weights)
        self.trainer.lr_scheduler = Schedule(self.trainer.optimizer, SETTINGS)

    def step(self, batch: Batch) -> Mapping[str, float]:
        data = self.trainer.prepare_batch(batch)
        found: Mapping[str, float] = self.trainer.train_step(self.trainer.micro_batches(data), 0)
        return found

    def logprobs(self, batch: Batch) -> list[Tensor]:
        found: list[Tensor] = self.trainer.all_logprobs(batch, temperature=1.0)
        return found

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        found: Iterator[tuple[str, Tensor]] = self.trainer.named_weights()
        return found

    def use(self, *, micro_batch_tokens: int, recompute: bool) -> None:
        self.trainer.micro_batch_tokens = micro_batch_tokens
        model = self.trainer.model
        if recompute:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            model.gradient_checkpointing_disable()


class MegatronLearner:
    """The same trainers led by Megatron. Collective: every rank makes one, the groups are there."""

    def __init__(
        self,
        shape: DecoderShape,
        topology: Any,
        *,
        algorithm: str = "sft",
        dtype: torch.dtype,
        device: str = "cpu",
        micro_batch_tokens: int,
        recompute: bool = False,
        weights: HFFolder | None = None,
    ) -> None:
        from rlhf_flows.models.megatron.training import MegatronTraining
        from rlhf_flows.modules.megatron.weights import load_folder

        self.model = build_megatron(
            shape, topology, dtype=dtype, device=device, recompute=recompute
        )
        if weights is not None:
            load_folder(self.model.decoders, weights, self.model.conversion)
        self.training = MegatronTraining(self.model, SETTINGS)
        self.trainer = _trainer(algorithm, layout="auto", tokens=micro_batch_tokens)
        self.trainer.attach(ModuleContext(device=device))
        for method in ("logprobs_of", "backward_all", "optimizer_step"):
            self.trainer.__dict__[method] = getattr(self.training, method)

    def step(self, batch: Batch) -> Mapping[str, float]:
        from megatron.core import parallel_state

        parts = self._parts(self.trainer.prepare_batch(batch))
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        found: Mapping[str, float] = self.trainer.train_step(parts[rank::size], 0)
        return found

    def logprobs(self, batch: Batch) -> list[Tensor]:
        scored = self.training.passes.response_logprobs(self._parts(batch))
        return [part.logprobs.cpu() for part in scored]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        found: Iterator[tuple[str, Tensor]] = self.model.named_weights()
        return found

    def use(self, *, micro_batch_tokens: int, recompute: bool) -> None:
        self.trainer.micro_batch_tokens = micro_batch_tokens
        for decoder in self.model.decoders:
            config = decoder.config
            config.recompute_granularity = "full" if recompute else None
            config.recompute_method = "uniform" if recompute else None
            config.recompute_num_layers = 1 if recompute else None

    def rows(self, batch: Batch) -> list[list[int]]:
        """Of each micro-batch, by what Megatron computes: each sample with a prompt of its own."""
        pairs = zip(batch["prompt_ids"], batch["response_ids"], strict=True)
        costs = [len(p) + len(r) for p, r in pairs]
        return cut_by_tokens(costs, budget=self.trainer.micro_batch_tokens)

    def _parts(self, batch: Batch) -> list[Batch]:
        return [select(batch, part) for part in self.rows(batch)]


def _read(folder: HFFolder) -> Iterator[tuple[str, Tensor]]:
    for file in dict.fromkeys(folder.weight_files.values()):
        yield from load_file(file).items()


def _trainer(algorithm: str, *, layout: Any, tokens: int) -> Any:
    # Of a model that is given, so the folder is never looked at.
    common: dict[str, Any] = {"path": _NOWHERE, "optimizer": SETTINGS, "layout": layout}
    if algorithm == "grpo":
        from rlhf_flows.models.policy_trainer import PolicyTrainer

        return PolicyTrainer("trainer", micro_batch_tokens=tokens, **common)
    from rlhf_flows.models.sft_trainer import SFTTrainer

    return SFTTrainer("trainer", micro_batch_tokens=tokens, **common)


def mixed_texts(total: int, *, longest: int, seed: int = 0) -> list[Text]:
    """Lengths of unequal prompts and responses, about `total` tokens together: a text has between
    a 16th of `longest` and all of it, short ones more often, a quarter of it prompt on average.
    """
    draws = random.Random(seed)
    texts: list[Text] = []
    left = total
    while left > 2:
        length = int(longest * 2 ** (-4 * draws.random()))
        length = max(2, min(length, left))
        prompt = max(1, min(length - 1, int(length * draws.uniform(0.1, 0.4))))
        texts.append((prompt, length - prompt))
        left -= length
    return texts


def batch_of(
    texts: Sequence[Text], *, vocabulary_size: int, siblings: int = 1, seed: int = 0
) -> Batch:
    """Random tokens of these lengths; neighbours share a prompt, and have rewards, where there are
    siblings.
    """
    g = torch.Generator().manual_seed(seed)
    prompts: list[Tensor] = []
    for i, (prompt, _) in enumerate(texts):
        if i % siblings == 0:
            prompts.append(torch.randint(3, vocabulary_size, (prompt,), generator=g))
        else:
            assert prompt == len(prompts[-1])
            prompts.append(prompts[-1])
    batch: Batch = {
        "prompt_ids": prompts,
        "response_ids": [torch.randint(3, vocabulary_size, (r,), generator=g) for _, r in texts],
    }
    if siblings > 1:
        batch["group"] = torch.arange(len(texts)) // siblings
        batch["reward"] = torch.rand(len(texts), generator=g)
    return batch
