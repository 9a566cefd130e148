"""A Hugging Face causal model as Megatron runs it: a cheap look whether it can, and loading it.

The decision here: what can be built is what a family says of itself (`Family.decoder_shape`), so a
new family is one file there and nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import DType, architecture_of, check_model_folder
from rlhf_flows.models.families import family_of, known_families
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.megatron_conversion import ShardedConversion
from rlhf_flows.modules.megatron_topology import Topology

__all__ = ["MegatronCausalLM", "check_megatron_folder", "load_megatron_causal_lm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronCausalLM:
    """This rank's part of a model. Its topology's groups outlive it."""

    decoders: Sequence[Any]
    """Its runs of layers (`megatron_model.Decoder`), in order."""
    shape: DecoderShape
    topology: Topology
    conversion: ShardedConversion
    device: str

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank, same order, to the end. Whole weights, by their checkpoint's
        names, in one order that is the same for every topology.
        """
        from rlhf_flows.modules.megatron_weights import exported_weights

        return exported_weights(self.decoders, self.shape, self.conversion)


def check_megatron_folder(path: str | Path, topology: Topology) -> DecoderShape:
    """What Megatron would build of the folder's model; no weights are read, no Megatron loaded.

    Raises ConfigError that names what cannot be built, or cannot be cut so.
    """
    shape, _ = _described(path)
    topology.check(shape)
    return shape


def load_megatron_causal_lm(
    path: str | Path,
    topology: Topology,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    recompute: bool = False,
) -> MegatronCausalLM:
    """This rank's part, with its weights; the groups of `topology` are there.

    Raises ConfigError as `check_megatron_folder`, or where the folder's weights are not all there.
    """
    from rlhf_flows.modules.megatron_model import build_decoder
    from rlhf_flows.modules.megatron_weights import load_folder

    shape, config = _described(path)
    folder = check_model_folder(path)
    make: Any = family_of(architecture_of(folder)).conversions["megatron"]
    conversion: ShardedConversion = make(config, tensor_parallel=topology.tensor_parallel)
    decoders = build_decoder(
        shape, topology, dtype=getattr(torch, dtype), device=device, recompute=recompute
    )
    load_folder(decoders, folder, conversion)
    return MegatronCausalLM(
        decoders=decoders, shape=shape, topology=topology, conversion=conversion, device=device
    )


def _described(path: str | Path) -> tuple[DecoderShape, Any]:
    from transformers import AutoConfig

    folder = check_model_folder(path)
    family = family_of(architecture_of(folder))
    if family.decoder_shape is None or "megatron" not in family.conversions:
        built = ", ".join(f.name for f in known_families() if f.decoder_shape is not None)
        raise ConfigError(
            f"the model in {str(path)!r} is of the family {family.name!r}, which Megatron does not"
            f" build here: it builds {built}. Train it with the torch modules, or register a family"
            " with decoder_shape and a conversion for 'megatron'"
        )
    config = AutoConfig.from_pretrained(Path(path).expanduser(), local_files_only=True)
    return family.decoder_shape(config), config
