"""`CausalLMTrainer`: what the ready-made trainers have in common. A rank's part of a global batch,
gradients over micro-batches, one AdamW step.

The decision here: a trainer is a loss. What it adds up besides the loss of a micro-batch is one
vector, so that cuts and ranks are summed in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.data.packing import deal
from rlhf_flows.models.adamw import Schedule, make_adamw, make_masters, step_masters
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_module import (
    CausalLMModule,
    cut_rows,
    groups_of,
    tokens_of_bins,
)
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import OptimizerSettings

__all__ = ["CausalLMTrainer"]

Result = TypeVar("Result")


class CausalLMTrainer(CausalLMModule):
    """A `CausalLMModule` that learns. Stands first among the bases of one with another head."""

    data_parallel: int | None = None
    """Ranks, where that is said of the module and not of its place (`models.<name>`)."""

    def __init__(
        self,
        name: str,
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        layout: Layout = "auto",
    ) -> None:
        """As `CausalLMModule`, with the settings of AdamW."""
        super().__init__(
            name,
            path=path,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            layout=layout,
        )
        self.optimizer_settings = optimizer or OptimizerSettings()

    def parallel_sizes(self) -> Mapping[str, int]:
        return {} if self.data_parallel is None else {"data_parallel_size": self.data_parallel}

    def samples_of(self, data: Batch) -> Batch:
        """prompt_ids and response_ids of a micro-batch that has others: what passes go through."""
        return data

    def setup(self) -> None:
        super().setup()
        if self.optimizer_settings.master_weights and self.dtype != "float32":
            self.master_weights = make_masters(self.model)
        self.optimizer = make_adamw(self.model, self.optimizer_settings, self.master_weights)
        self.lr_scheduler = Schedule(self.optimizer, self.optimizer_settings)

    def cut(self, data: Batch, rows: Sequence[int]) -> list[list[int]]:
        """`rows` of the batch in micro-batches, this data parallel rank's share of them: about as
        many tokens as each other's (`deal`).

        By `runtime.train_micro_batch_size` rows where the run asks for it, else by tokens:
        `runtime.train_micro_batch_tokens`, or the module's own `micro_batch_tokens`.
        """
        asked, size = self.runtime_args, self.data_parallel_size
        prompts = [data["prompt_ids"][i] for i in rows]
        responses = [data["response_ids"][i] for i in rows]
        found = groups_of(data) if self.shares_prompts else None
        groups = None if found is None else [found[i] for i in rows]
        if count := asked.get("train_micro_batch_size"):
            bins = [list(range(i, min(i + count, len(rows)))) for i in range(0, len(rows), count)]
        else:
            budget = asked.get("train_micro_batch_tokens") or self.micro_batch_tokens
            multiple = self.lanes.count * size
            bins = cut_rows(prompts, responses, groups, budget=budget, multiple=multiple)
        shares = deal(tokens_of_bins(bins, prompts, responses, groups), size)
        return [[rows[i] for i in bins[part]] for part in shares[self.data_parallel_rank]]

    def backward_all(
        self, data: Sequence[Batch], loss_of: Callable[[Batch], tuple[Tensor, Result]]
    ) -> list[Result]:
        """The gradients of all micro-batches' losses become the parameters'.

        Returns what `loss_of` gave beside each loss, in the order of `data`.
        """
        self.model.train()
        self.model.zero_grad()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.lanes.count == 1:
            # In place: a large model has no room for a micro-batch's gradients beside their sum.
            return [_backward(*loss_of(micro_batch)) for micro_batch in data]

        def work(part: Sequence[Batch]) -> tuple[list[Tensor | None], list[Result]]:
            total: list[Tensor | None] = [None] * len(parameters)
            found = []
            for micro_batch in part:
                loss, beside = loss_of(micro_batch)
                # Not backward(): lanes would add to the same gradients at once.
                _add(total, torch.autograd.grad(loss, parameters, allow_unused=True))
                found.append(beside)
            return total, found

        lanes = self.lanes.run(work, data)
        for total, _ in lanes:
            own = [p.grad for p in parameters]
            _add(own, total)
            for p, grad in zip(parameters, own, strict=True):
                p.grad = grad
        return [lanes[i % len(lanes)][1][i // len(lanes)] for i in range(len(data))]

    def optimizer_step(self, sums: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Collective: every rank, same order. One step by the gradients that are there.

        `sums` [n] are summed over ranks and returned; the first is the loss. There is no step, and
        there are no metrics of it, where the trainer refuses it. Raises NonFiniteError before
        anything changes.
        """
        sums = self.sum_gradients(sums)
        if self.refuses(sums):
            self.model.zero_grad()
            return sums, {}
        norm = self.clip_gradients(float(sums[0]), self.optimizer_settings.max_grad_norm)
        rate: float = self.lr_scheduler.set_learning_rate()
        if self.master_weights is None:
            self.optimizer.step()
        else:
            step_masters(self.model, self.optimizer, self.master_weights)
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return sums, {"grad_norm": norm, "learning_rate": rate}

    def refuses(self, sums: Tensor) -> bool:  # [n] of all ranks
        """Whether to leave weights, optimizer and schedule as they are; the same on all ranks."""
        return False

    def step_on(
        self,
        data: Sequence[Batch],
        loss_of: Callable[[Batch], tuple[Tensor, Tensor]],
        *,
        beside: Sequence[float] = (),
        num_sums: int,
    ) -> tuple[list[float], dict[str, float]]:
        """Collective: every rank, same order. One optimizer step on this rank's micro-batches.

        `loss_of` gives a micro-batch's share of the loss, and `num_sums` numbers, the loss first.
        Returns these and the numbers of `beside`, summed over micro-batches and ranks, with the
        metrics of the step. Raises NonFiniteError before anything changes.
        """
        numbers = [0.0] * num_sums + list(beside)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.context.device)
        for part in self.backward_all(data, loss_of):
            sums[:num_sums] += part
        sums, metrics = self.optimizer_step(sums)
        return sums.tolist(), metrics


def _backward(loss: Tensor, beside: Result) -> Result:
    torch.autograd.backward(loss)
    return beside


def _add(total: list[Tensor | None], more: Iterable[Tensor | None]) -> None:
    """Adds in place; takes over what was nothing before."""
    for i, tensor in enumerate(more):
        if tensor is not None:
            own = total[i]
            total[i] = tensor if own is None else own.add_(tensor)
