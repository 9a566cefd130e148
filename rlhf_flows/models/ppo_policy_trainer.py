"""`PPOPolicyTrainer`: trains a policy by PPO with a value model, the KL in the reward.

The decision here: it is `PolicyTrainer` with other advantages, one for each token in place of one
for each sample. Loss, passes, old logprobs, importance correction and resume are the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.causal_lm_module import ragged
from rlhf_flows.models.kl_controller import KLController
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.ppo_targets import ppo_targets
from rlhf_flows.models.response_logprobs import Layout
from rlhf_flows.settings import GRPOSettings, OptimizerSettings, PolicySettings, PPOSettings

__all__ = ["PPOPolicyTrainer"]


class PPOPolicyTrainer(PolicyTrainer):
    """PPO on batches with prompt_ids, response_ids, behaviour_logprobs, values and reward.

    With `kl_coef` also reference_logprobs; with truncation "mask" or "penalize" also finish_reason.
    """

    def __init__(
        self,
        name: str = "ppo_policy",
        *,
        path: str | Path,
        optimizer: OptimizerSettings | None = None,
        ppo: PPOSettings | None = None,
        micro_batch_tokens: int = 4096,
        dtype: DType = "float32",
        gradient_checkpointing: bool = False,
        layout: Layout = "auto",
    ) -> None:
        """As `PolicyTrainer`; `ppo` is that of the `ValueTrainer` as well."""
        self.ppo = ppo or PPOSettings()
        self.kl_controller = KLController(self.ppo)
        shared = self.ppo.model_dump(include=set(PolicySettings.model_fields))
        super().__init__(
            name,
            path=path,
            optimizer=optimizer,
            # The KL is in the reward, so none is in the loss; its estimate is reported.
            grpo=GRPOSettings(**shared, kl_coef=0.0, kl_estimator=self.ppo.kl_estimator),
            micro_batch_tokens=micro_batch_tokens,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            layout=layout,
        )

    def before_episode(self, episode: int) -> None:
        self.kl_controller.begin_episode()

    def after_episode(self, episode: int) -> None:
        self.kl_controller.end_episode()

    def training_tensors(self) -> Mapping[str, Tensor]:
        return {**super().training_tensors(), **self.kl_controller.tensors()}

    def prepare_batch(self, data: Batch) -> Batch:
        """Adds `advantages` and `token_weight` (ragged) of the whole global batch, and what it is
        known by: `score`, `sequence_kl` and `return` [B].
        """
        kl_coef = self.kl_controller.coef
        targets = ppo_targets(data, self.ppo, module=self.name, kl_coef=kl_coef)
        self.kl_controller.see(data, targets.sequence_kl)
        return {
            **data,
            "score": targets.score,
            "sequence_kl": targets.sequence_kl,
            "return": targets.first_return,
            "advantages": ragged(targets.advantages, targets.lengths),
            "token_weight": ragged(targets.token_weight, targets.lengths),
        }

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float]:
        return {**super().train_step(data, iteration), **self.kl_controller.metrics()}
