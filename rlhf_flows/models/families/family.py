"""What a family says of its models, and the registry of families.

The decision here: a family is a few words of data, found by the architecture that a model folder
names. Those that a program registered travel inside its modules, so that workers know them without
importing the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.modules.conversion import Conversion
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.fingerprint import fingerprint
from rlhf_flows.registry import Registry, nearest

__all__ = [
    "Family",
    "FamilyCarrier",
    "conversion_of",
    "family_of",
    "known_families",
    "register_family",
    "registered_families",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of `transformers` that differ by their sizes and weights alone."""

    name: str
    causal: str
    """Its class with a language-model head, as `config.json` names it; logits are the head's
    weight times the last hidden state, and nothing else."""
    scalar: str | None = None
    """Its class for sequence classification, with the head `score`: what value and reward models
    are. None where `transformers` has none."""
    shared_prefix: bool = True
    """Whether the shared-prefix layout is exact: attention goes through `transformers`' attention
    interface, all that a token knows of its place is `position_ids`, and each layer sees all before
    it, or a window that the configuration names. Otherwise batches are padded."""
    learned_positions: bool = False
    """Whether positions are rows of a table, so that a longer text cannot be computed at all."""
    conversions: Mapping[str, Callable[..., Conversion]] = field(default_factory=dict)
    """By backend, where its running model has other names or shapes than a Hugging Face checkpoint:
    the conversion for a model of this configuration. Those of "transformers" are of the modules
    that train and score; those of "megatron" are a `ShardedConversion`, and take
    `tensor_parallel`, too."""
    decoder_shape: Callable[[Any], DecoderShape] | None = None
    """From its configuration, what Megatron builds its layers from; raises ConfigError where they
    have something that cannot be built so. None where Megatron cannot build the family."""


_FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        "gemma": "rlhf_flows.models.families.plain:GEMMA",
        "gpt2": "rlhf_flows.models.families.gpt2:GPT2",
        "llama": "rlhf_flows.models.families.plain:LLAMA",
        "mistral": "rlhf_flows.models.families.plain:MISTRAL",
        "mixtral": "rlhf_flows.models.families.mixtral:MIXTRAL",
        "qwen2": "rlhf_flows.models.families.plain:QWEN2",
        "qwen3": "rlhf_flows.models.families.plain:QWEN3",
    },
)
_REGISTERED: dict[str, Family] = {}
"""Of those, what a program registered: it travels to the workers."""


def register_family(family: Family) -> Family:
    """Makes the family's architectures known here, and wherever modules of this program run.

    Call it where modules are made; a second time, as in a notebook, replaces the first. It promises
    what the fields say: `check_family` on a model of it tells whether that is true.

    Raises ConfigError where its name or one of its architectures is another family's.
    """
    for architecture in filter(None, (family.causal, family.scalar)):
        other = _by_architecture().get(architecture)
        if other is not None and other.name != family.name:
            raise ConfigError(
                f"{architecture} belongs to the model family {other.name!r}: give that name to"
                " yours if it is to replace one that you registered"
            )
    _REGISTERED[family.name] = _FAMILIES.register(family.name, family)
    return family


def known_families() -> list[Family]:
    """This package's own, then those registered."""
    return [_FAMILIES.find(name) for name in _FAMILIES.names()]


def registered_families() -> dict[str, Family]:
    """Those that this program registered, by name."""
    return dict(_REGISTERED)


def family_of(architecture: str, *, where: str = "the model") -> Family:
    """The family that an architecture belongs to, as its causal or its scalar class.

    Raises ConfigError with the families known, and how to add one.
    """
    known = _by_architecture()
    if architecture not in known:
        families = ", ".join(f"{f.name} ({f.causal})" for f in known_families())
        raise ConfigError(
            f"{where} is a {architecture}{nearest(architecture, list(known))}, of no family known"
            f" here: known are {families}. Register its family with rlhf_flows.register_family and"
            " try it with rlhf_flows.check_family (docs/families.md)"
        )
    return known[architecture]


def conversion_of(model: Any, *, backend: str = "transformers") -> Conversion | None:
    """Between the parameters of `model` and its checkpoint; None where they are the same."""
    make = family_of(type(model).__name__).conversions.get(backend)
    return None if make is None else make(model.config)


def _by_architecture() -> dict[str, Family]:
    return {a: f for f in known_families() for a in (f.causal, f.scalar) if a is not None}


class FamilyCarrier(BaseModule):
    """A module that brings the families registered in its program to wherever it is unpickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_families": tuple(_REGISTERED.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for family in state.pop("_families", ()):
            register_family(family)
        self.__dict__.update(state)

    def fingerprint(self) -> bytes:
        """As of every module, with the families: a mended one takes effect in a living worker."""
        return super().fingerprint() + fingerprint(_REGISTERED)
