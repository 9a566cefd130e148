"""`ValueTrainer`: trains a value model on the returns of PPO's samples.

The decision here: as in `PolicyTrainer`, targets and weights are made once for the whole global
batch, so that any cut into micro-batches, over any number of ranks, gives the same gradient; and so
are the statistics of returns, which are part of the weights that a `ValueModel` follows.

Letters: T response tokens of a micro-batch, flat, in sample order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rlhf_flows.algorithms.value import value_loss
from rlhf_flows.algorithms.value_norm import denormalized
from rlhf_flows.data.batch import Batch, batch_size, select
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_module import flat, ragged
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.models.kl_controller import KLController
from rlhf_flows.models.ppo_targets import ppo_targets
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.scalar_module import ScalarModule
from rlhf_flows.models.value_scale import (
    check_scale,
    make_moments,
    read_scale,
    scale_tensors,
    write_scale,
)
from rlhf_flows.settings import OptimizerSettings, PPOSettings

__all__ = ["ValueTrainer"]

_SUMS = (
    "loss", "clip_fraction", "value", "return_sum", "return_square", "error", "error_square",
    "tokens", "rows_trained", "rows_filtered",
)  # fmt: skip
"""What micro-batches add up, the loss first; those from "clip_fraction" on are over tokens. Rows
that are filtered are in no micro-batch that is computed.
"""


class ValueTrainer(CausalLMTrainer, ScalarModule):
    """PPO's value function on batches with prompt_ids, response_ids, behaviour_logprobs, values
    and reward; with `kl_coef` also reference_logprobs.
    """

    def __init__(
        self,
        name: str = "ppo_value",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        ppo: PPOSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        layout: Layout = "auto",
    ) -> None:
        """`path` as in `ValueModel`, and the same folder; `ppo` that of the `PPOPolicyTrainer`."""
        super().__init__(
            name,
            path=path,
            optimizer=optimizer,
            dtype=dtype,
            micro_batch_tokens=micro_batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
            layout=layout,
        )
        self.ppo = ppo or PPOSettings()
        self.kl_controller = KLController(self.ppo)
        self.moments = make_moments(self.ppo)

    def validate(self) -> None:
        super().validate()
        check_scale(self.path, self.ppo, module=self.name)

    def setup(self) -> None:
        super().setup()
        scale = read_scale(self.path)
        for name, tensor in scale_tensors(self.moments).items():
            if name in scale:
                tensor.copy_(scale[name])

    def extra_weights(self) -> Mapping[str, Tensor]:
        """The statistics of returns that the model's outputs are normalized by."""
        return {**super().extra_weights(), **scale_tensors(self.moments)}

    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)
        write_scale(folder, self.moments)

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        super().export_weights(weights, folder)
        write_scale(folder, self.moments)

    def before_episode(self, episode: int) -> None:
        self.kl_controller.begin_episode()

    def after_episode(self, episode: int) -> None:
        self.kl_controller.end_episode()

    def training_tensors(self) -> Mapping[str, Tensor]:
        return {**super().training_tensors(), **self.kl_controller.tensors()}

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `returns` and `token_weight` (ragged) of the whole global batch, and takes its
        trained returns into the statistics by which they are normalized.
        """
        kl_coef = self.kl_controller.coef
        targets = ppo_targets(data, self.ppo, module=self.name, kl_coef=kl_coef)
        self.kl_controller.see(data, targets.sequence_kl)
        if self.moments is not None:
            self.moments.update(targets.returns[targets.token_weight != 0])
        return {
            **data,
            "returns": ragged(targets.returns, targets.lengths),
            "token_weight": ragged(targets.token_weight, targets.lengths),
        }

    def micro_batches(self, data: Batch) -> list[Batch]:
        """This rank's micro-batches, cut by tokens; on rank 0 the last holds the masked rows."""
        weighs = [bool((w != 0).any()) for w in data["token_weight"]]
        parts = self.cut(data, [i for i, yes in enumerate(weighs) if yes])
        idle = [i for i, yes in enumerate(weighs) if not yes]
        if idle and self.data_parallel_rank == 0:
            parts.append(idle)
        return [select(data, part) for part in parts]

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        """Collective: every rank, same order. One optimizer step on one global batch.

        Raises NonFiniteError, weights untouched, where the loss or a gradient is not finite.
        """
        is_active = [bool((flat(batch["token_weight"]) != 0).any()) for batch in data]
        active = [batch for batch, yes in zip(data, is_active, strict=True) if yes]
        idle = [batch_size(batch) for batch, yes in zip(data, is_active, strict=True) if not yes]
        sums, metrics = self.step_on(
            active, self._loss, num_sums=len(_SUMS) - 1, beside=[sum(idle)]
        )
        found = dict(zip(_SUMS, sums, strict=True))
        tokens = max(found["tokens"], 1.0)
        means = {name: found.pop(name) / tokens for name in _SUMS[1:7]}
        spread = means["return_square"] - means["return_sum"] ** 2
        left = means["error_square"] - means["error"] ** 2
        return {
            **found,
            "clip_fraction": means["clip_fraction"],
            "value": means["value"],
            "return": means["return_sum"],
            "explained_variance": 1.0 - left / spread if spread > 1e-12 else 0.0,
            **self._scale_metrics(),
            **self.kl_controller.metrics(),
            **metrics,
        }

    def _scale_metrics(self) -> dict[str, float]:
        if self.moments is None:
            return {}
        return {"return_mean": float(self.moments.mean), "return_std": float(self.moments.std)}

    def _loss(self, data: Batch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the loss; and what it adds to `_SUMS`."""
        values = self.scores_of(data)  # [T]
        old, returns, weights = (
            flat(data[name]).to(values.device) for name in ("values", "returns", "token_weight")
        )
        found = value_loss(values, *self._learnt(data, old, returns), clip=self.ppo.value_clip)
        loss = (weights * found.loss).sum()
        now, target = values.detach().to(torch.float64), returns.to(torch.float64)
        if self.moments is not None:
            now = denormalized(now, self.moments.mean, self.moments.std)
        error = target - now
        sums = [
            loss.detach().to(torch.float64), found.clipped.sum(), now.sum(), target.sum(),
            (target**2).sum(), error.sum(), (error**2).sum(),
        ]  # fmt: skip
        counts = torch.tensor(
            [len(now), batch_size(data)], dtype=torch.float64, device=values.device
        )
        return loss, torch.cat([torch.stack([s.to(torch.float64) for s in sums]), counts])

    def _learnt(self, data: Batch, old: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:  # [T]
        """Old values and returns on the scale of the model's outputs."""
        if self.moments is None:
            return old, returns
        if "normalized_values" in data:
            # What the model gave then, by the statistics of then: a clip is of what it learned
            # since, not of where the mean went.
            old = flat(data["normalized_values"]).to(returns)
        else:
            old = self.moments.normalized(old)
        return old, self.moments.normalized(returns)
