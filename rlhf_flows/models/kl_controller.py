"""`KLController`: the adaptive KL coefficient of PPO's trainers.

The decision here: the coefficient stands still within an episode, so that its rewards are fixed
before its first update, and moves once at its end. Policy and value each run one on the same
samples, as they make their targets (ppo_targets.py): nothing is sent between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_flows.algorithms.adaptive_kl import adapted_kl_coef
from rlhf_flows.data.batch import Batch
from rlhf_flows.settings import PPOSettings

__all__ = ["KLController"]


class KLController:
    """Of one trainer; every rank has its own, and all see whole global batches."""

    def __init__(self, settings: PPOSettings) -> None:
        self._settings = settings
        self._coef = torch.tensor([settings.kl_coef], dtype=torch.float64)
        self._seen: dict[str, float] = {}
        """The divergence of each sample of this episode, once however often it is trained."""

    @property
    def coef(self) -> float:
        """For the rewards of this episode."""
        return float(self._coef)

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint has to keep, filled in place when it is loaded."""
        return {"kl_controller.coef": self._coef} if self._settings.adaptive_kl else {}

    def begin_episode(self) -> None:
        """Forgets what an episode that came to no end has left."""
        self._seen.clear()

    def see(self, data: Batch, sequence_kl: Tensor) -> None:  # [B]
        """Takes in a global batch."""
        names = data.get("sample_id") or [str(len(self._seen) + i) for i in range(len(sequence_kl))]
        self._seen.update(zip(map(str, names), sequence_kl.tolist(), strict=True))

    def end_episode(self) -> None:
        """Sets the coefficient for the next episode, where the settings say that it adapts."""
        settings, count = self._settings, len(self._seen)
        if settings.adaptive_kl and count:
            self._coef.fill_(
                adapted_kl_coef(
                    self.coef,
                    kl=math.fsum(self._seen.values()) / count,
                    num_samples=count,
                    target=settings.kl_target,
                    horizon=settings.kl_horizon,
                )
            )
        self._seen.clear()

    def metrics(self) -> dict[str, float]:
        return {"kl_coef": self.coef} if self._settings.adaptive_kl else {}
