"""What the ready-made roles on a Hugging Face causal model share: loading it, and logprobs of a
batch in micro-batches cut by tokens.

Letters: B samples, T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from rlhf_flows.data.batch import Batch
from rlhf_flows.data.packing import cut_by_tokens
from rlhf_flows.errors import ConfigError, DataError
from rlhf_flows.models.causal_lm import DType, check_model_folder, load_causal_lm, load_tokenizer
from rlhf_flows.models.families import FamilyCarrier, conversion_of
from rlhf_flows.models.lanes import Lanes
from rlhf_flows.models.logprob_head import ScoredTokens
from rlhf_flows.models.response_logprobs import Layout, response_logprobs, siblings_of
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.torch_module import TorchModule

__all__ = [
    "CausalLMModule",
    "Scorer",
    "column",
    "cut_rows",
    "flat",
    "groups_of",
    "ragged",
    "tokens_of_bins",
]

Scorer = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int] | None], Sequence[Tensor]]
"""(prompts, responses, groups) of a micro-batch to one tensor for each row, on the CPU."""


class CausalLMModule(FamilyCarrier, TorchModule):
    """Base of what scores, and of all trainers (`CausalLMTrainer`); a subclass may load a model of
    another head.
    """

    shares_prompts: ClassVar[bool] = True
    """Whether a pass may compute a prompt once for its siblings: micro-batches count it so."""

    lanes = Lanes(nn.Identity(), num_threads=1, device="cpu")
    """Of micro-batches; `setup` makes the model's own."""

    def __init__(
        self,
        name: str,
        *,
        path: str | Path,
        dtype: DType = "float32",
        micro_batch_tokens: int = 4096,
        gradient_checkpointing: bool = False,
        layout: Layout = "auto",
    ) -> None:
        """
        Args:
            path: a local Hugging Face folder: model and tokenizer.
            dtype: precision of the weights and of what is computed with them.
            micro_batch_tokens: most tokens of one forward pass, each prompt counted once for its
                siblings; a sample that is longer goes alone.
            gradient_checkpointing: compute activations again in the backward pass: less memory,
                about a third more work.
            layout: "auto" shares prompts wherever it is exact; "padded" never does.
        """
        super().__init__(name)
        self.path = Path(path).expanduser().absolute()
        self.dtype: DType = dtype
        self.micro_batch_tokens = micro_batch_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.layout: Layout = layout

    def validate(self) -> None:
        if self.dtype not in get_args(DType):
            raise ConfigError(
                f"dtype of module {self.name!r} is {self.dtype!r}, expected one of"
                f" {', '.join(get_args(DType))}"
            )
        if self.layout not in get_args(Layout):
            raise ConfigError(
                f"layout of module {self.name!r} is {self.layout!r}, expected one of"
                f" {', '.join(get_args(Layout))}"
            )
        if self.micro_batch_tokens < 1:
            raise ConfigError(
                f"micro_batch_tokens of module {self.name!r} is {self.micro_batch_tokens},"
                " expected at least 1; 4096 suits small models on CPU"
            )
        self.check_folder()

    def check_folder(self) -> HFFolder:
        """What the folder says of its model. Raises ConfigError where it is none for this role."""
        return check_model_folder(self.path)

    def load_model(self) -> Any:
        return load_causal_lm(
            self.path,
            dtype=self.dtype,
            device=self.context.device,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def setup(self) -> None:
        self.tokenizer = load_tokenizer(self.path)
        self.model = self.load_model()
        self.conversion = conversion_of(self.model)
        self.lanes = Lanes(
            self.model, num_threads=self.context.num_threads, device=self.context.device
        )

    # ---- logprobs -------------------------------------------------------------------------

    def logprobs_of(
        self, data: Batch, *, temperature: float, entropy: bool = False
    ) -> ScoredTokens:  # [T]
        """Of the response tokens of one micro-batch, with gradient where the mode has one."""
        prompts = [*column(data, "prompt_ids", self.name)]
        responses = [*column(data, "response_ids", self.name)]
        return response_logprobs(
            self.model,
            prompts,
            responses,
            groups_of(data),
            temperature=temperature,
            entropy=entropy,
            layout=self.layout,
        )

    def all_logprobs(self, data: Batch, *, temperature: float) -> list[Tensor]:  # B of [r]
        """Of all rows, in their order, without gradient, in micro-batches cut by tokens."""

        def score(
            prompts: Sequence[Tensor], responses: Sequence[Tensor], groups: Sequence[int] | None
        ) -> Sequence[Tensor]:
            scored = response_logprobs(
                self.model,
                prompts,
                responses,
                groups,
                temperature=temperature,
                layout=self.layout,
            )
            return ragged(scored.logprobs.cpu(), [len(r) for r in responses])

        return self.all_rows(data, score)

    def all_rows(self, data: Batch, score: Scorer) -> list[Tensor]:
        """What `score` gives for each row, in their order, without gradient, in micro-batches."""
        prompts = [*column(data, "prompt_ids", self.name)]
        responses = [*column(data, "response_ids", self.name)]
        groups = groups_of(data)
        found: list[Tensor] = [torch.empty(0)] * len(responses)

        def work(micro_batches: Sequence[Sequence[int]]) -> None:
            for rows in micro_batches:
                parts = score(
                    [prompts[i] for i in rows],
                    [responses[i] for i in rows],
                    None if groups is None else [groups[i] for i in rows],
                )
                for i, part in zip(rows, parts, strict=True):
                    found[i] = part.clone()

        bins = cut_rows(
            prompts,
            responses,
            groups,
            budget=self.micro_batch_tokens,
            multiple=self.lanes.count,
        )
        with self._evaluating():
            self.lanes.run(work, bins)
        return found


def cut_rows(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    groups: Sequence[int] | None,
    *,
    budget: int,
    multiple: int = 1,
) -> list[list[int]]:
    """Rows in micro-batches of at most `budget` tokens, siblings together, longest first.

    Their number is a multiple of `multiple` where that takes no more than smaller ones. A group
    that is dearer than the budget is cut into parts that are not, each with the prompt; that
    changes the work, never the result.
    """
    units: list[list[int]] = []
    costs: list[int] = []
    start = 0
    for count in siblings_of(prompts, groups):
        for i in range(start, start + count):
            cost = len(responses[i])
            if i == start or costs[-1] + cost > budget:
                units.append([])
                costs.append(len(prompts[i]))
            units[-1].append(i)
            costs[-1] += cost
        start += count
    bins = _cut_evenly(costs, budget=budget, multiple=multiple)
    return [[i for unit in part for i in units[unit]] for part in bins]


def tokens_of_bins(
    bins: Sequence[Sequence[int]],
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    groups: Sequence[int] | None,
) -> list[int]:
    """What `cut_rows` counts of each of its bins: tokens, a prompt once for siblings in it."""
    found = []
    for rows in bins:
        first = 0
        total = sum(len(responses[i]) for i in rows)
        own = None if groups is None else [groups[i] for i in rows]
        for count in siblings_of([prompts[i] for i in rows], own):
            total += len(prompts[rows[first]])
            first += count
        found.append(total)
    return found


def _cut_evenly(costs: Sequence[int], *, budget: int, multiple: int) -> list[list[int]]:
    bins = cut_by_tokens(costs, budget=budget)
    wanted = min(-(-len(bins) // multiple) * multiple, len(costs))
    # The least budget that gives so many, or nearly: by eighths of a bin above their mean.
    mean = -(-sum(costs) // max(wanted, 1))
    for eighths in range(8, 16):
        smaller = max(1, min(budget, mean * eighths // 8))
        some = cut_by_tokens(costs, budget=smaller)
        if len(bins) <= len(some) <= wanted:
            return some
    return bins


def column(data: Batch, name: str, module: str) -> Any:
    """Raises DataError naming the module where the batch lacks the column."""
    if name not in data:
        raise DataError(
            f"module {module!r} needs the column {name!r}, and the batch has {sorted(data)}: call"
            " the module that makes it earlier in the flow"
        )
    return data[name]


def flat(values: Iterable[Tensor]) -> Tensor:
    """A ragged column (a list of [t], or a tensor [B, t]) as one tensor [T]."""
    rows = list(values)
    return torch.cat(rows) if rows else torch.empty(0)


def ragged(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The inverse of `flat`."""
    return list(values.split(list(lengths)))


def groups_of(data: Batch) -> list[int] | None:
    """The column `group`, where there is one."""
    groups = data.get("group")
    return None if groups is None else [int(g) for g in groups]
