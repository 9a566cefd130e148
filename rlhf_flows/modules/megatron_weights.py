"""Hugging Face weights into a Megatron model of any topology, and out of it, bit for bit.

Two decisions. A rank reads from the files no more than it has: safetensors give slices, and the
conversion of a share wants nothing else. And weights come out parameter by parameter, in one order
on all ranks, so that the most beside the model is one parameter, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron_conversion import EMBEDDING, HEAD, Part, ShardedConversion

__all__ = ["exported_weights", "global_parameters", "load_folder", "parameter_order"]

_VOCABULARY = (EMBEDDING, HEAD)


def global_parameters(decoders: Sequence[Any]) -> dict[str, Tensor]:
    """This rank's parameters, by names in which layers are numbered over all stages."""
    found: dict[str, Tensor] = {}
    for decoder in decoders:
        for name, parameter in decoder.named_parameters():
            own = name
            if name.startswith("decoder.layers."):
                _, _, place, rest = name.split(".", 3)
                layer = decoder.decoder.layers[int(place)].layer_number - 1
                own = f"decoder.layers.{layer}.{rest}"
            found[own] = parameter
    return found


@torch.no_grad()
def load_folder(decoders: Sequence[Any], folder: HFFolder, conversion: ShardedConversion) -> None:
    """This rank's share of the folder's weights becomes its parameters, in their dtype.

    Raises ConfigError, naming the weight, where the folder lacks one or has it in another shape.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in set(folder.weight_files.values())
        }
        for name, parameter in global_parameters(decoders).items():
            pieces = []
            for part in conversion.parts(name):
                if part.name not in folder.weight_files:
                    raise ConfigError(
                        f"the folder {str(folder.path)!r} has no weight {part.name!r}, which its"
                        " configuration asks for: save the model again"
                    )
                whole = files[folder.weight_files[part.name]].get_slice(part.name)
                rows = len(parameter) if name in _VOCABULARY else None
                pieces.append(_share(whole, part, rank=rank, size=size, rows=rows))
            merged = conversion.merge(name, pieces)
            if merged.shape != parameter.shape:
                raise ConfigError(
                    f"{[p.name for p in conversion.parts(name)]} of {str(folder.path)!r} make"
                    f" {list(merged.shape)} for {name}, expected {list(parameter.shape)}: its"
                    " configuration is not that of its weights"
                )
            parameter.copy_(merged)


def _share(whole: Any, part: Part, *, rank: int, size: int, rows: int | None) -> Tensor:
    """A rank's slice; `rows` are those of a padded vocabulary, whose padding is zero."""
    if part.axis is None:
        everything: Tensor = whole[:]
        return everything
    found = whole.get_shape()[part.axis]
    each = rows if rows is not None else found // size
    start, stop = min(rank * each, found), min((rank + 1) * each, found)
    piece: Tensor = whole[start:stop] if part.axis == 0 else whole[:, start:stop]
    if rows is None or len(piece) == rows:
        return piece
    return torch.cat([piece, piece.new_zeros(rows - len(piece), *piece.shape[1:])])


# ---- out ----------------------------------------------------------------------------------------


def parameter_order(shape: DecoderShape, names: Sequence[str]) -> list[str]:
    """`names` as a text meets them: embedding, layers, last norm, head; without the tied head."""

    def place(name: str) -> int:
        if name == EMBEDDING:
            return -1
        _, _, layer, *_ = f"{name}..".split(".", 3)
        return int(layer) if name.startswith("decoder.layers.") else shape.num_layers

    untied = [name for name in names if not (shape.tied and name == HEAD)]
    return sorted(untied, key=lambda name: (place(name), name == HEAD))


@torch.no_grad()
def exported_weights(
    decoders: Sequence[Any], shape: DecoderShape, conversion: ShardedConversion
) -> Iterator[tuple[str, Tensor]]:
    """Collective: every rank, same order, to the end. All weights, whole, under their names in the
    checkpoint, on every rank; each tensor is the receiver's own.
    """
    own = global_parameters(decoders)
    mine = {
        name: [(part, _whole_shape(name, p, shape, conversion)[part.name]) for part in parts]
        for name, p in own.items()
        for parts in [conversion.parts(name)]
    }
    stages = parallel_state.get_pipeline_model_parallel_group()
    plans: list[Any] = [None] * stages.size()
    torch.distributed.all_gather_object(plans, mine, group=stages)
    ranks = torch.distributed.get_process_group_ranks(stages)
    owners: dict[str, int] = {}
    for stage, plan in enumerate(plans):
        for name in plan:
            assert name not in owners
            owners[name] = stage
    device, dtype = next((p.device, p.dtype) for p in own.values())
    for name in parameter_order(shape, list(owners)):
        whole = _gathered(name, own[name], shape, conversion) if name in own else {}
        for part, size in plans[owners[name]][name]:
            if stages.size() > 1:
                held = whole.get(part.name)
                if held is None:
                    held = torch.empty(size, device=device, dtype=dtype)
                torch.distributed.broadcast(held, ranks[owners[name]], group=stages)
                yield part.name, held
            else:
                yield part.name, whole[part.name]


def _whole_shape(
    name: str, parameter: Tensor, shape: DecoderShape, conversion: ShardedConversion
) -> dict[str, tuple[int, ...]]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    shapes: dict[str, tuple[int, ...]] = {}
    for part, (_, piece) in zip(
        conversion.parts(name), conversion.split(name, parameter.detach()), strict=True
    ):
        found = list(piece.shape)
        if name in _VOCABULARY:
            found[0] = shape.vocabulary_size
        elif part.axis is not None:
            found[part.axis] *= size
        shapes[part.name] = tuple(found)
    return shapes


def _gathered(
    name: str, parameter: Tensor, shape: DecoderShape, conversion: ShardedConversion
) -> dict[str, Tensor]:
    """Collective over the tensor parallel ranks of a stage. A parameter's parts, whole."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = conversion.parts(name)
    shares = [parameter.detach()]
    if group.size() > 1 and any(part.axis is not None for part in parts):
        shares = [torch.empty_like(parameter) for _ in range(group.size())]
        torch.distributed.all_gather(shares, parameter.detach().contiguous(), group=group)
    split = [[piece for _, piece in conversion.split(name, share)] for share in shares]
    whole: dict[str, Tensor] = {}
    for part, pieces in zip(parts, zip(*split, strict=True), strict=True):
        joined = torch.cat(pieces, dim=part.axis or 0) if len(pieces) > 1 else pieces[0].clone()
        if name in _VOCABULARY:
            joined = joined[: shape.vocabulary_size].clone()
        whole[part.name] = joined.contiguous()
    return whole
