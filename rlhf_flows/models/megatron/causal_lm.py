"""A Hugging Face causal model as Megatron runs it: a cheap look whether it can, and loading it.

The decision here: what can be built is what a family says of itself (`Family.decoder_shape`), so a
new family is one file there and nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.causal_lm import DType, architecture_of, check_model_folder
from rlhf_flows.models.families import family_of, known_families
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron.conversion import ShardedConversion
from rlhf_flows.modules.megatron.topology import Topology

__all__ = [
    "MegatronCausalLM",
    "built",
    "check_megatron_folder",
    "described",
    "load_megatron_causal_lm",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronCausalLM:
    """This rank's part of a model, or of one with a scalar head (`scalar.py`). Its
    topology's groups outlive it.
    """

    decoders: Sequence[Any]
    """Its runs of layers (`rlhf_flows.modules.megatron.model.Decoder`), in order."""
    shape: DecoderShape
    topology: Topology
    conversion: ShardedConversion
    device: str

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank, same order, to the end. Whole weights, by their checkpoint's
        names, in one order that is the same for every topology.
        """
        from rlhf_flows.modules.megatron.weights import exported_weights

        return exported_weights(self.decoders, self.shape, self.conversion)


def check_megatron_folder(path: str | Path, topology: Topology) -> DecoderShape:
    """What Megatron would build of the folder's model; no weights are read, no Megatron loaded.

    Raises ConfigError that names what cannot be built, or cannot be cut so.
    """
    shape, _ = described(check_model_folder(path))
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
    folder = check_model_folder(path)
    shape, config = described(folder)
    return built(folder, shape, config, topology, dtype=dtype, device=device, recompute=recompute)


def described(folder: HFFolder) -> tuple[DecoderShape, Any]:
    """What the folder's family makes of its configuration, and the configuration; no weights.

    Raises ConfigError where Megatron does not build the family, or this model of it.
    """
    from transformers import AutoConfig

    family = family_of(architecture_of(folder))
    if family.decoder_shape is None or "megatron" not in family.conversions:
        known = ", ".join(f.name for f in known_families() if f.decoder_shape is not None)
        raise ConfigError(
            f"the model in {str(folder.path)!r} is of the family {family.name!r}, which Megatron"
            f" does not build here: it builds {known}. Train it with the torch modules, or register"
            " a family with decoder_shape and a conversion for 'megatron'"
        )
    config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
    return family.decoder_shape(config), config


def built(
    folder: HFFolder,
    shape: DecoderShape,
    config: Any,
    topology: Topology,
    *,
    dtype: DType,
    device: str,
    recompute: bool,
    make_head: Callable[[Tensor], None] | None = None,
) -> MegatronCausalLM:
    """This rank's part of the folder's model as `shape` says it, with its weights; `make_head` as
    in `load_folder`.
    """
    from rlhf_flows.modules.megatron.model import build_decoder
    from rlhf_flows.modules.megatron.weights import load_folder

    make: Any = family_of(architecture_of(folder)).conversions["megatron"]
    conversion: ShardedConversion = make(config, tensor_parallel=topology.tensor_parallel)
    decoders = build_decoder(
        shape, topology, dtype=getattr(torch, dtype), device=device, recompute=recompute
    )
    load_folder(decoders, folder, conversion, make_head=make_head)
    return MegatronCausalLM(
        decoders=decoders, shape=shape, topology=topology, conversion=conversion, device=device
    )
