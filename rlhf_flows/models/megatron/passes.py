"""Passes of micro-batches through a model that ranks share, by Megatron's own schedules.

Two decisions. A loss is a callback, as in `CausalLMTrainer`: it is called with a micro-batch where
the pipeline ends, asks `logprobs_of` for that micro-batch's logprobs, and gives its share of the
loss. And losses are sums: what a micro-batch counts for is in its weights, so gradients are added
up over micro-batches and data parallel ranks, and nothing divides them; cuts and empty ranks do not
change them.

Letters: B samples, T response tokens of a micro-batch, flat, in sample order; N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.logprob_head import ScoredTokens
from rlhf_flows.models.megatron.causal_lm import MegatronCausalLM
from rlhf_flows.models.megatron.logprobs import vocabulary_parallel_logprobs
from rlhf_flows.models.megatron.scalar import with_ends
from rlhf_flows.modules.megatron.cpu import calling_megatron
from rlhf_flows.modules.megatron.model import hidden_states, packed_texts

__all__ = ["LossOf", "MegatronPasses"]

Result = TypeVar("Result")
LossOf = Callable[[Batch], tuple[Tensor, Result]]
"""A micro-batch's share of the loss, and beside it what is to be known of it: a tensor, or a tuple
of tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    data: Batch | None
    """None: one token of no weight, where a schedule or other ranks want one more micro-batch."""
    tokens: Tensor
    """[1, N]: of each sample its prompt and all of its response but the last token."""
    packed: Any
    scored_from: Tensor
    """[T]: which of the N the logprob of each response token is computed from."""
    targets: Tensor
    """[T]"""


class MegatronPasses:
    """Of one model; `chunks` are its runs of layers, wrapped where they are trained."""

    def __init__(self, model: MegatronCausalLM, chunks: Sequence[Any] | None = None) -> None:
        self.model = model
        self.chunks = list(model.decoders if chunks is None else chunks)
        self._in_flight: tuple[_Packed, Tensor] | None = None

    # ---- what ranks call ------------------------------------------------------------------------

    def forward_backward(
        self,
        data: Sequence[Batch],
        loss_of: LossOf[Result],
        *,
        samples_of: Callable[[Batch], Batch] = lambda data: data,
    ) -> list[Result]:
        """Collective: every rank, same order. Gradients of the micro-batches' losses.

        `data` are those of this data parallel rank, the same on all its ranks; there may be none.
        `samples_of` makes prompt_ids and response_ids of a micro-batch that has others. Returns
        what `loss_of` gave beside the losses, in the order of `data`, on all ranks of the model.
        """
        for decoder in self.model.decoders:
            decoder.train()
        return self._run(data, loss_of, samples_of=samples_of, backward=True)

    def response_logprobs(
        self, data: Sequence[Batch], *, temperature: float = 1.0, entropy: bool = False
    ) -> list[ScoredTokens]:
        """Collective: every rank, same order. Of each micro-batch of this data parallel rank,
        without gradient, on all ranks of the model.
        """

        def score(part: Batch) -> Tensor:
            scored = self.logprobs_of(part, temperature=temperature, entropy=entropy)
            spread = scored.logprobs if scored.entropy is None else scored.entropy
            return torch.stack([scored.logprobs, spread])

        return [
            ScoredTokens(logprobs=part[0], entropy=part[1] if entropy else None)
            for part in self._without_gradient(data, score)
        ]

    def response_scores(self, data: Sequence[Batch], *, ends: bool = False) -> list[Tensor]:
        """As `response_logprobs`, of a model with a scalar head: of each micro-batch [T] float32,
        before each response token; with `ends` [T + B], as after the last one of each sample.
        """
        if not ends:
            return self._without_gradient(data, self.scores_of)
        return self._without_gradient([with_ends(part) for part in data], self.scores_of)

    def last_scores(self, data: Sequence[Batch]) -> list[Tensor]:
        """As `response_scores`: of each micro-batch [B], at the last token of each response."""
        return self._without_gradient(data, self.last_scores_of, samples_of=with_ends)

    # ---- what a loss calls ----------------------------------------------------------------------

    def logprobs_of(
        self, data: Batch, *, temperature: float, entropy: bool = False
    ) -> ScoredTokens:  # [T]
        """Of the micro-batch whose loss is asked for, with gradient where the mode has one."""
        lengths = [len(r) for r in data["response_ids"]]
        return self._logprobs(lengths, temperature=temperature, entropy=entropy)

    def scores_of(self, data: Batch) -> Tensor:  # [T] float32
        """As `logprobs_of`, of a model with a scalar head: before each response token."""
        return self._scores([len(r) for r in data["response_ids"]])

    def last_scores_of(self, data: Batch) -> Tensor:  # [B] float32
        """As `scores_of`, at the last token of each response. `samples_of` made the samples longer
        by `with_ends`; `data` are they as they were.
        """
        lengths = [len(r) + 1 for r in data["response_ids"]]
        scores = self._scores(lengths)
        ends = torch.tensor(lengths, device=scores.device).cumsum(0) - 1
        return scores.index_select(0, ends)

    def _logprobs(
        self, lengths: Sequence[int], *, temperature: float = 1.0, entropy: bool = False
    ) -> ScoredTokens:
        hidden, targets = self._scored_states(lengths)
        return vocabulary_parallel_logprobs(
            hidden,
            self.model.decoders[-1].head_weight(),
            targets,
            vocabulary_size=self.model.shape.vocabulary_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            temperature=temperature,
            entropy=entropy,
        )

    def _scores(self, lengths: Sequence[int]) -> Tensor:  # [T] float32
        hidden, _ = self._scored_states(lengths)
        scores: Tensor = self.model.decoders[-1].score(hidden)
        return scores[:, 0].float()

    def _scored_states(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:  # [T, D], [T]
        """Of the micro-batch in flight: the state before each response token, and the token.

        A vocabulary is shared by tensor parallel ranks: each has its share of the states' gradient,
        and the backward pass sums these. Of a scalar head each has all, and of the gradient too.
        """
        assert self._in_flight is not None, "states are there while a loss is computed"
        batch, hidden = self._in_flight  # [N, 1, D], or this rank's share of the N
        assert len(batch.targets) == sum(lengths), "other samples than those that were packed"
        shared = not self.model.shape.scalar_head
        if self.model.topology.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=shared
            )
        chosen = hidden[:, 0].index_select(0, batch.scored_from)
        if shared and not self.model.topology.sequence_parallel:
            chosen = tensor_parallel.copy_to_tensor_model_parallel_region(chosen)
        return chosen, batch.targets

    # ---- inside ---------------------------------------------------------------------------------

    def _without_gradient(
        self,
        data: Sequence[Batch],
        score: Callable[[Batch], Tensor],
        *,
        samples_of: Callable[[Batch], Batch] = lambda data: data,
    ) -> list[Tensor]:
        for decoder in self.model.decoders:
            decoder.eval()

        def loss_of(part: Batch) -> tuple[Tensor, Tensor]:
            found = score(part)
            return found.sum(), found

        with torch.no_grad():
            return self._run(data, loss_of, samples_of=samples_of, backward=False)

    def _run(
        self,
        data: Sequence[Batch],
        loss_of: LossOf[Result],
        *,
        samples_of: Callable[[Batch], Batch],
        backward: bool,
    ) -> list[Result]:
        batches = [self._pack(part, samples_of(part)) for part in data]
        batches += [self._stand_in()] * (self._wanted(len(batches)) - len(batches))
        iterators = [iter(batches) for _ in self.chunks]

        def step(iterator: Iterator[_Packed], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            hidden = hidden_states(chunk, batch.tokens, batch.packed)
            return hidden, partial(self._loss, batch, loss_of)

        single = len(self.chunks) == 1
        try:
            with calling_megatron(self.model.device):
                found: list[Any] = get_forward_backward_func()(
                    forward_step_func=step,
                    data_iterator=iterators[0] if single else iterators,
                    model=self.chunks[0] if single else self.chunks,
                    num_microbatches=len(batches),
                    seq_length=1,  # of no meaning: lengths vary, and are sent along
                    micro_batch_size=1,
                    forward_only=not backward,
                )
        finally:
            self._in_flight = None
        return self._from_the_last_stage(found[: len(data)])

    def _loss(
        self, batch: _Packed, loss_of: LossOf[Any], hidden: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """As Megatron asks for it: the loss, tokens to divide it by (none), what to collect."""
        no_tokens = torch.zeros([], dtype=torch.int, device=hidden.device)
        self._in_flight = (batch, hidden)
        if batch.data is None:
            # Its head is computed as well: a rank that left out what others do would be waited for.
            is_scalar = self.model.shape.scalar_head
            found = self._scores([1]) if is_scalar else self._logprobs([1]).logprobs
            loss, beside = found.sum() * 0.0, None
        else:
            loss, beside = loss_of(batch.data)
        self._in_flight = None
        return loss, no_tokens, beside

    def _wanted(self, num_batches: int) -> int:
        """Micro-batches that the schedule takes: one at least, whole rounds of stages, and as many
        on every data parallel rank, so that all ranks meet in the same collectives.
        """
        topology = self.model.topology
        if topology.data_parallel > 1:
            most = torch.tensor(num_batches, device=self.model.device)
            group = parallel_state.get_data_parallel_group()
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
            num_batches = int(most)
        multiple = topology.pipeline_parallel if topology.virtual_pipeline > 1 else 1
        return max(1, -(-num_batches // multiple)) * multiple

    def _pack(self, data: Batch, samples: Batch) -> _Packed:
        prompts, responses = samples["prompt_ids"], samples["response_ids"]
        texts = [torch.cat([p, r[:-1]]) for p, r in zip(prompts, responses, strict=True)]
        scored, start = [], 0
        for prompt, response, text in zip(prompts, responses, texts, strict=True):
            scored.append(torch.arange(len(response)) + (start + len(prompt) - 1))
            start += len(text)
        return self._placed(data, texts, torch.cat(scored), torch.cat(list(responses)))

    def _stand_in(self) -> _Packed:
        token = torch.zeros(1, dtype=torch.int64)
        return self._placed(None, [token], token, token)

    def _placed(
        self, data: Batch | None, texts: Sequence[Tensor], scored: Tensor, targets: Tensor
    ) -> _Packed:
        device, topology = self.model.device, self.model.topology
        multiple = topology.tensor_parallel if topology.sequence_parallel else 1
        packed, total = packed_texts([len(t) for t in texts], multiple=multiple, device=device)
        tokens = torch.cat([*texts, texts[0].new_zeros(total - sum(len(t) for t in texts))])
        return _Packed(
            data=data,
            tokens=tokens[None].to(device),
            packed=packed,
            scored_from=scored.to(device),
            targets=targets.to(device),
        )

    def _from_the_last_stage(self, found: list[Any]) -> list[Any]:
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() == 1:
            return found
        last = torch.distributed.get_process_group_ranks(group)[-1]
        sent = [_moved(found, "cpu")]
        torch.distributed.broadcast_object_list(sent, last, group=group)
        return [_moved(result, self.model.device) for result in sent[0]]


def _moved(values: Any, device: str) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_moved(value, device) for value in values)
    return values.detach().to(device)
