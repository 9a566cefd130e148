"""When a run is to stop by itself: `runtime.stop_if`.

The decision here: a rail is a threshold on one committed metric and a number of episodes in a row,
nothing that needs a memory of its own, so that a resumed run comes to the same decision. How it is
checked is the affair of tasks/guard_rails.py.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from rlhf_flows.settings import Settings

__all__ = ["MetricRail", "StopIf"]


class MetricRail(Settings):
    """Bounds of one metric; beyond one of them for so many episodes in a row, the run stops."""

    metric: str = Field(
        min_length=1,
        description="Of an episode's training, such as grad_norm; of several trained modules, each"
        " that has it, or one of them: policy_trainer/loss.",
    )
    above: float | None = Field(default=None, description="Bad above this.")
    below: float | None = Field(default=None, description="Bad below this.")
    for_episodes: PositiveInt = Field(default=1, description="Bad episodes in a row that stop it.")

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError(
                f"runtime.stop_if.metrics names {self.metric!r} without a bound: give above, below"
                " or both"
            )
        return self


class StopIf(Settings):
    """Guard rails, checked after each episode is trained and committed. What the run has come to by
    then is kept; it is resumed with another rail.
    """

    nan: bool = Field(
        default=True,
        description="Stop where the reward, advantage, KL, entropy or gradient norm of an episode"
        " is NaN or infinite. A loss that is stops the run in any case.",
    )
    kl_above: float | None = Field(
        default=None, gt=0, description="Stop where the policy is farther from its reference: kl."
    )
    reward_below: float | None = Field(
        default=None, description="Stop where the mean reward of an episode is lower."
    )
    entropy_below: float | None = Field(
        default=None, ge=0, description="Stop where the policy is more certain: entropy, in nats."
    )
    for_episodes: PositiveInt = Field(
        default=1,
        description="Bad episodes in a row that stop the run: of kl_above, reward_below and"
        " entropy_below, each by itself.",
    )
    metrics: list[MetricRail] = Field(
        default_factory=list, description="Bounds of other metrics of an episode's training."
    )

    def rails(self) -> list[tuple[str, MetricRail]]:
        """All thresholds alike, each with the name of its setting."""
        short = (
            ("kl_above", "kl", self.kl_above, None),
            ("reward_below", "reward", None, self.reward_below),
            ("entropy_below", "entropy", None, self.entropy_below),
        )
        found = [
            (
                setting,
                MetricRail(metric=metric, above=above, below=below, for_episodes=self.for_episodes),
            )
            for setting, metric, above, below in short
            if above is not None or below is not None
        ]
        return [*found, *(("metrics", rail) for rail in self.metrics)]
