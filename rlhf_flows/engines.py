"""Engines of known shape: which modules there are, what each is called with, who follows whom.

ChatLearn's signatures. The decision here: an engine is its flows and nothing else, so that modules
of one's own fit in wherever a ready-made one does. A module may return its new columns alone, or
all it was given with them: each call below is given all that it may need.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rlhf_flows.data import Batch
from rlhf_flows.engine import Engine, Environment, Evaluator, Trainer
from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.tasks.backfill import Backfill

__all__ = [
    "DPOEngine",
    "EvalEngine",
    "GRPOEngine",
    "OnlineDPOEngine",
    "RLHFEngine",
    "RewardModelEngine",
    "SFTEngine",
]


class GRPOEngine(Engine):
    """Group relative policy optimization (arXiv 2402.03300): policy, reward, trainer.

    The reference is needed where the loss has a KL term.
    """

    def __init__(
        self,
        policy: BaseModule,
        policy_trainer: BaseModule,
        reward: BaseModule,
        reference: BaseModule | None = None,
        name: str = "grpo",
        *,
        reference_ema: float | None = None,
    ) -> None:
        """
        Args:
            reference_ema: The reference follows the moving average of the policy's weights, with
                this share of the newest after each episode; None: it stays as it is.
        """

        def env_flow(batch: Any) -> Any:
            sampled = policy.forward_step(batch)
            scored = reward.forward_step(sampled)
            if reference is None:
                return sampled, scored
            return sampled, reference.forward_step(sampled), scored

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)  # type: ignore[call-arg]

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name=name)
        self._policy, self._reward = policy, reward
        self.set_parameter_sync(policy_trainer, policy)
        if reference_ema is not None:
            if reference is None:
                raise ConfigError(
                    f"reference_ema={reference_ema} needs a reference that follows the policy: give"
                    " the engine one, or leave it out"
                )
            self.set_parameter_sync(policy_trainer, reference, eta=reference_ema)

    def set_eval_dataset(self, dataset: Sequence[Any] | str | Path) -> Self:
        """Held-out prompts: evaluation samples from the policy and asks the same reward."""
        return self.set_evaluator(_evaluator(self._policy, self._reward).set_dataset(dataset))


class SFTEngine(Engine):
    """Supervised fine-tuning: a dataset and a trainer, no environment."""

    def __init__(self, trainer: BaseModule, name: str = "sft") -> None:
        def trainer_flow(batch: Any) -> None:
            trainer.train_step(batch)  # type: ignore[call-arg]

        super().__init__(None, Trainer(trainer_flow), name=name)


class RewardModelEngine(Engine):
    """A reward model learnt from preferences: a dataset of pairs and a trainer, no environment.

    The ready-made ones: RewardTrainer, RewardModel. Their rows are {prompt, chosen, rejected}, or
    {prompt, pos_answers, neg_answers} of which every pair is an item.
    """

    def __init__(
        self, trainer: BaseModule, reward: BaseModule | None = None, name: str = "reward-model"
    ) -> None:
        """`reward` is needed where held-out pairs are to be evaluated: it follows the trainer."""

        def trainer_flow(batch: Any) -> None:
            trainer.train_step(batch)  # type: ignore[call-arg]

        super().__init__(None, Trainer(trainer_flow), name=name)
        self._trainer_module, self._reward = trainer, reward

    def set_eval_dataset(self, dataset: Sequence[Any] | str | Path) -> Self:
        """Held-out pairs, for how often the better completion is rewarded more."""
        reward = self._reward
        if reward is None:
            raise ConfigError(
                "set_eval_dataset needs a module that takes the trainer's weights: give the engine"
                " one, RewardModelEngine(trainer, RewardModel(path=…))"
            )
        if self.evaluator is None:
            self.set_parameter_sync(self._trainer_module, reward)

        def eval_flow(batch: Any) -> Any:
            return reward.eval_step(batch)

        return self.set_evaluator(Evaluator(eval_flow).set_dataset(dataset))


class RLHFEngine(Engine):
    """PPO with six models (InstructGPT, arXiv 2203.02155): what samples, what scores, what learns.

    The ready-made ones: a policy (VLLMPolicy, TorchPolicy), Reference, RewardModel, ValueModel,
    PPOPolicyTrainer, ValueTrainer.
    """

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: BaseModule,
        value: BaseModule,
        ppo_policy: BaseModule,
        ppo_value: BaseModule,
        name: str = "rlhf",
        *,
        reference_ema: float | None = None,
    ) -> None:
        """`reference_ema` as in `GRPOEngine`."""

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            value_out = value.forward_step(policy_out)
            reward_out = reward.forward_step(policy_out, ref_out, value_out)  # type: ignore[arg-type, call-arg]
            return policy_out, ref_out, value_out, reward_out

        def trainer_flow(batch: Any) -> None:
            ppo_policy.train_step(batch)  # type: ignore[call-arg]
            ppo_value.train_step(batch)  # type: ignore[call-arg]

        _check_settings(ppo_policy, ppo_value, value)
        super().__init__(Environment(env_flow), Trainer(trainer_flow), name=name)
        self._policy, self._reward = policy, reward
        self.set_parameter_sync(ppo_policy, policy)
        if reference_ema is not None:
            self.set_parameter_sync(ppo_policy, reference, eta=reference_ema)
        self.set_parameter_sync(ppo_value, value)

    def set_eval_dataset(self, dataset: Sequence[Any] | str | Path, *more: BaseModule) -> Self:
        """Held-out prompts: evaluation samples from the policy and asks the same reward, and
        whatever other judges are given as `more`.
        """
        return self.set_evaluator(
            _evaluator(self._policy, self._reward, *more).set_dataset(dataset)
        )


class DPOEngine(Engine):
    """Direct preference optimization (arXiv 2305.18290): a frozen reference, and a trainer.

    The ready-made ones: PreferenceReference, DPOTrainer, with rows as in `RewardModelEngine`.
    Nothing is sampled.
    """

    def __init__(self, reference: BaseModule, ppo_policy: BaseModule, name: str = "dpo") -> None:
        def env_flow(batch: Any) -> Any:
            return reference.forward_step(batch)

        def trainer_flow(batch: Any) -> None:
            ppo_policy.train_step(batch)  # type: ignore[call-arg]

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name=name)


class OnlineDPOEngine(Engine):
    """DPO on pairs that the policy samples and a reward ranks (arXiv 2402.04792).

    The ready-made ones: a policy, Reference, RewardModel or FunctionReward, OnlineDPOTrainer.
    `runtime.num_inference_per_prompt` is the size of a group, at least 2.
    """

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: BaseModule,
        ppo_policy: BaseModule,
        name: str = "online-dpo",
        *,
        reference_ema: float | None = None,
    ) -> None:
        """`reference_ema` as in `GRPOEngine`."""

        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            reward_out = reward.forward_step(policy_out, ref_out)  # type: ignore[arg-type]
            return policy_out, ref_out, reward_out

        def trainer_flow(batch: Any) -> None:
            ppo_policy.train_step(batch)  # type: ignore[call-arg]

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name=name)
        self._policy, self._reward = policy, reward
        self.set_parameter_sync(ppo_policy, policy)
        if reference_ema is not None:
            self.set_parameter_sync(ppo_policy, reference, eta=reference_ema)

    def set_eval_dataset(self, dataset: Sequence[Any] | str | Path, *more: BaseModule) -> Self:
        """Held-out prompts: evaluation samples from the policy and asks the same reward, and
        whatever other judges are given as `more`.
        """
        return self.set_evaluator(
            _evaluator(self._policy, self._reward, *more).set_dataset(dataset)
        )


class EvalEngine(Engine):
    """Evaluates models as they are: `eval_step` of each in sequence, nothing is trained."""

    def __init__(self, models: BaseModule | Sequence[BaseModule], name: str = "eval") -> None:
        """The first of `models` builds the dataset; each later one sees what those before gave."""
        several = [models] if isinstance(models, BaseModule) else list(models)
        if not several:
            raise ConfigError("an EvalEngine without models has nothing to ask: give it one")
        super().__init__(None, None, _evaluator(*several), name=name)

    def set_backfill(self, backfill: Backfill) -> Self:
        """Versions of another run, evaluated into that one in place of the models as they are."""
        self._backfill = backfill
        return self

    def eval(self, **settings: Any) -> dict[str, list[Batch]]:
        """`Engine.evaluate`, as ChatLearn calls it."""
        return self.evaluate(**settings)


def _check_settings(ppo_policy: BaseModule, *others: BaseModule) -> None:
    """The ready-made trainers compute the same returns, each for itself."""
    ours = getattr(ppo_policy, "ppo", None)
    for other in others:
        theirs = getattr(other, "ppo", None)
        if ours is None or theirs is None or ours == theirs:
            continue
        odd = [n for n in type(ours).model_fields if getattr(ours, n) != getattr(theirs, n)]
        raise ConfigError(
            f"{ppo_policy.name!r} and {other.name!r} have different PPO settings"
            f" ({', '.join(f'{n}={getattr(ours, n)} and {getattr(theirs, n)}' for n in odd)}):"
            " the value must be that of the returns the policy learns from, so give both the same"
            " ppo"
        )


def _evaluator(*models: BaseModule) -> Evaluator:
    def eval_flow(batch: Any) -> Any:
        found: list[Any] = []
        for model in models:
            # The rows as well: a model may return nothing but its own columns.
            found.append(model.eval_step(batch, *found))
        return tuple(found)

    return Evaluator(eval_flow)
