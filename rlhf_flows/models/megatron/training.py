"""Optimizer steps on a model that ranks share: Megatron's gradient buffers and AdamW, this
package's schedule, clipping and checks.

The decision here: a step is as `CausalLMTrainer` defines it (losses are sums, clipping is by the
global norm, a step that is not finite changes nothing, vectors do not decay), so that a run does
not depend on what trains it. Where weights are bfloat16, Megatron keeps float32 ones for the
optimizer, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import NonFiniteError
from rlhf_flows.models.adamw import Schedule
from rlhf_flows.models.logprob_head import ScoredTokens
from rlhf_flows.models.megatron.causal_lm import MegatronCausalLM
from rlhf_flows.models.megatron.passes import LossOf, MegatronPasses, Result
from rlhf_flows.modules.megatron.cpu import calling_megatron
from rlhf_flows.settings import OptimizerSettings

__all__ = ["MegatronTraining"]


class MegatronTraining:
    """A model that learns, by the methods that a `CausalLMTrainer` calls on itself. Made after its
    weights were loaded.
    """

    def __init__(
        self,
        model: MegatronCausalLM,
        settings: OptimizerSettings | None = None,
        *,
        distributed_optimizer: bool = False,
    ) -> None:
        """Collective: every rank. With `distributed_optimizer` the data parallel ranks share what
        the optimizer keeps, instead of each having all of it.
        """
        self.model = model
        self.settings = settings or OptimizerSettings()
        config = model.decoders[0].config
        config.finalize_model_grads_func = _finalize
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer
        )
        with calling_megatron(model.device):
            self.chunks = [
                DistributedDataParallel(config, buffers, decoder, disable_bucketing=i > 0)
                for i, decoder in enumerate(model.decoders)
            ]
            self.optimizer = get_megatron_optimizer(
                self._optimizer_config(config, distributed_optimizer), self.chunks
            )
        for group in self.optimizer.param_groups:
            # Only Megatron's own schedule would apply the factor, and it is not used here.
            group["weight_decay"] = self.settings.weight_decay * group["wd_mult"]
            # torch's AdamW otherwise makes copies of all moments on CUDA.
            group["fused"], group["foreach"] = True, False
        self.lr_scheduler = Schedule(self.optimizer, self.settings)
        self.passes = MegatronPasses(model, self.chunks)

    def logprobs_of(
        self, data: Batch, *, temperature: float, entropy: bool = False
    ) -> ScoredTokens:  # [T]
        """As `MegatronPasses.logprobs_of`: for a loss, while it is computed."""
        return self.passes.logprobs_of(data, temperature=temperature, entropy=entropy)

    def scores_of(self, data: Batch) -> Tensor:  # [T]
        """As `MegatronPasses.scores_of`: for a loss, while it is computed."""
        return self.passes.scores_of(data)

    def last_scores_of(self, data: Batch) -> Tensor:  # [B]
        """As `MegatronPasses.last_scores_of`: for a loss, while it is computed. Of micro-batches
        that `backward_all` was given with `samples_of` that ends in `with_ends`.
        """
        return self.passes.last_scores_of(data)

    def backward_all(
        self,
        data: Sequence[Batch],
        loss_of: LossOf[Result],
        *,
        samples_of: Callable[[Batch], Batch] = lambda data: data,
    ) -> list[Result]:
        """Collective: every rank, same order. The gradients of all micro-batches' losses, summed
        over data parallel ranks; as `MegatronPasses.forward_backward`.
        """
        self._drop_gradients()
        return self.passes.forward_backward(data, loss_of, samples_of=samples_of)

    def optimizer_step(
        self, sums: Tensor, *, refuses: Callable[[Tensor], bool] = lambda sums: False
    ) -> tuple[Tensor, dict[str, float]]:
        """Collective: every rank, same order. One step by the gradients that are there.

        `sums` [n] are summed over data parallel ranks and returned; the first is the loss. There is
        no step, and there are no metrics of it, where `refuses` says so of these. Raises
        NonFiniteError, on all ranks, before anything changes.
        """
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        if refuses(sums):
            self._drop_gradients()
            return sums, {}
        with calling_megatron(self.model.device):
            norm = self._clipped_norm(float(sums[0]))
            rate: float = self.lr_scheduler.set_learning_rate()
            self.optimizer.step_with_ready_grads()
        self.lr_scheduler.step()
        return sums, {"grad_norm": norm, "learning_rate": rate}

    def _clipped_norm(self, loss: float) -> float:
        """Of all gradients of all ranks before they are clipped."""
        unusable = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if unusable or not math.isfinite(loss) or not math.isfinite(norm):
            self._drop_gradients()
            raise NonFiniteError(
                f"training by Megatron met a loss of {loss} and a gradient norm of {norm}: the"
                " weights were left as they are. Lower the learning rate, or look at the rewards"
                " and logprobs of this batch"
            )
        if (limit := self.settings.max_grad_norm) is not None:
            for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, limit, norm)
        return norm

    def _drop_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _optimizer_config(self, config: Any, distributed_optimizer: bool) -> Any:
        settings = self.settings
        return OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.max_grad_norm or 0.0,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
        )


def _finalize(chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
    """Sums gradients over ranks. Megatron's own, without its division by tokens."""
    finalize_model_grads(chunks, None, **kwargs)
