"""What trains: a trainer of some kind on a backend.

The decision here: a backend is one more class for each kind of trainer, found by the kind's name. A
backend to come (FSDP2, DeepSpeed) is one more room like `models/megatron/`, and a name here.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm_trainer import CausalLMTrainer
from rlhf_flows.settings import BackendSettings

__all__ = ["on_backend"]

Trainer = TypeVar("Trainer", bound=CausalLMTrainer)


def on_backend(
    kind: type[Trainer], name: str, *, backend: BackendSettings, **arguments: Any
) -> Trainer:
    """A trainer of this kind, with these arguments, on that backend.

    Raises ConfigError where there is none of this kind on it.
    """
    if backend.backend == "torch":
        trainer = kind(name, **arguments)
        trainer.data_parallel = backend.data_parallel
        return trainer
    from rlhf_flows.models.megatron import trainers

    found = getattr(trainers, f"Megatron{kind.__name__}", None)
    if found is None or not issubclass(found, kind):
        there_are = [own.removeprefix("Megatron") for own in trainers.__all__]
        raise ConfigError(
            f"{kind.__name__} does not train on Megatron here: it has {', '.join(there_are)}. Make"
            f" one of your own by class Megatron{kind.__name__}(OnMegatron, {kind.__name__},"
            " MegatronRole)"
        )
    return cast(Trainer, found(name, megatron=backend, **arguments))
