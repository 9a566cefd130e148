"""`ValueModel`: what is to be expected of a completion, before each of its tokens.

It follows a `ValueTrainer` as a policy follows its trainer. Made from a causal model its head is
zero, so that the first advantages are those of no value function at all. Where its trainer
normalizes returns, their statistics come with the weights: what it gives is always on the scale of
returns, that of its own version, however far its trainer has gone since.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rlhf_flows.algorithms.value_norm import denormalized
from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.models.scalar_module import ScalarModule
from rlhf_flows.models.value_scale import MEAN, STD, is_scale, read_scale, take_off
from rlhf_flows.modules.base import TakeWeights, TensorKind
from rlhf_flows.settings import PPOSettings

__all__ = ["ValueModel"]


class ValueModel(ScalarModule):
    """Adds `values` to batches with `prompt_ids` and `response_ids`."""

    def __init__(
        self,
        name: str = "value",
        *,
        path: str | Path,
        ppo: PPOSettings | None = None,
        dtype: DType = "float32",
        micro_batch_tokens: int = 8192,
        layout: Layout = "auto",
    ) -> None:
        """`path` is a causal model's folder, or that of a model with a scalar head, such as a
        reward model's or what a `ValueTrainer` saved; `ppo` that of the trainers, which
        says what is wanted beside the values; the rest is as in `CausalLMModule`.
        """
        super().__init__(
            name, path=path, dtype=dtype, micro_batch_tokens=micro_batch_tokens, layout=layout
        )
        self.ppo = ppo
        self._scale: Mapping[str, Tensor] = {}
        """What its outputs are to be multiplied by and moved; empty where they are values."""

    def setup(self) -> None:
        super().setup()
        self.model.requires_grad_(False)
        self._scale = read_scale(self.path)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        scale: dict[str, Tensor] = {}
        super().load_weights(take_off(weights, scale))
        self._scale = scale

    @contextmanager
    def receiving_weights(self, kinds: Sequence[TensorKind]) -> Iterator[TakeWeights]:
        scale: dict[str, Tensor] = {}
        with super().receiving_weights([kind for kind in kinds if not is_scale(kind[0])]) as take:
            yield lambda weights: take(list(take_off(weights, scale)))
        self._scale = scale

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """The batch with `values`: ragged float32, one before each response token, on the scale
        of returns. Where `ppo` normalizes them, `normalized_values` are the model's own outputs;
        where it bootstraps, `last_value` [B] float32 is that after the last token.
        """
        ppo = self.ppo or PPOSettings()
        outputs = self.all_scores(data, ends=ppo.bootstrap_truncated)
        values = [self._value(row) for row in outputs]
        found: Batch = {}
        if ppo.bootstrap_truncated:
            found["last_value"] = torch.stack([row[-1] for row in values])
            values, outputs = ([row[:-1] for row in rows] for rows in (values, outputs))
        if ppo.value_norm != "none":
            found["normalized_values"] = outputs
        return {**data, "values": values, **found}

    def _value(self, outputs: Tensor) -> Tensor:  # [r] -> [r]
        if not self._scale:
            return outputs
        return denormalized(outputs, self._scale[MEAN], self._scale[STD])
