"""Hugging Face weights into a Megatron model of any topology, and out of it, bit for bit.

Two decisions. A rank reads from the files no more than it has: safetensors give slices, and the
conversion of a share wants nothing else. And weights come out parameter by parameter, in one order
on all ranks, so that the most beside the model is one parameter, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron.conversion import (
    EMBEDDING,
    HEAD,
    SCORE,
    Part,
    ShardedConversion,
)

__all__ = [
    "exported_weights",
    "global_parameters",
    "load_folder",
    "parameter_order",
    "share_of",
    "whole_shapes",
]

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
def load_folder(
    decoders: Sequence[Any],
    folder: HFFolder,
    conversion: ShardedConversion,
    *,
    make_head: Callable[[Tensor], None] | None = None,
) -> None:
    """This rank's share of the folder's weights becomes its parameters, in their dtype.

    `make_head` fills a scalar head [1, D] where the folder has none.

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
            if name == SCORE and SCORE not in folder.weight_files and make_head is not None:
                make_head(parameter)
                continue
            pieces = []
            for part in conversion.parts(name):
                if part.name not in folder.weight_files:
                    raise ConfigError(
                        f"the folder {str(folder.path)!r} has no weight {part.name!r}, which its"
                        " configuration asks for: save the model again"
                    )
                whole = files[folder.weight_files[part.name]].get_slice(part.name)
                rows = len(parameter)
                pieces.append(share_of(whole, part, name, rank=rank, size=size, rows=rows))
            merged = conversion.merge(name, pieces)
            if merged.shape != parameter.shape:
                raise ConfigError(
                    f"{[p.name for p in conversion.parts(name)]} of {str(folder.path)!r} make"
                    f" {list(merged.shape)} for {name}, expected {list(parameter.shape)}: its"
                    " configuration is not that of its weights"
                )
            parameter.copy_(merged)


def share_of(whole: Any, part: Part, name: str, *, rank: int, size: int, rows: int) -> Tensor:
    """A rank's slice of a part of the parameter `name`, whose first axis has `rows` there: those of
    a vocabulary are padded by zeros. `whole` is a tensor, or a slice of a file.
    """
    if part.axis is None:
        everything: Tensor = whole[:]
        return everything
    is_padded = name in _VOCABULARY
    found = (whole.shape if isinstance(whole, Tensor) else whole.get_shape())[part.axis]
    each = rows if is_padded else found // size
    start, stop = min(rank * each, found), min((rank + 1) * each, found)
    piece: Tensor = whole[start:stop] if part.axis == 0 else whole[:, start:stop]
    if not is_padded or len(piece) == rows:
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
    return sorted(untied, key=lambda name: (place(name), name in (HEAD, SCORE)))


@torch.no_grad()
def exported_weights(
    decoders: Sequence[Any],
    shape: DecoderShape,
    conversion: ShardedConversion,
    *,
    masters: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Collective: every rank, same order, to the end. All weights, whole, under their names in the
    checkpoint, on every rank; each tensor is the receiver's own.

    `masters` gives what is exported in place of a parameter, in float32: called by all ranks that
    have the parameter.
    """
    own = global_parameters(decoders)
    mine = {
        name: [(part, whole_shapes(name, p, shape, conversion)[part.name]) for part in parts]
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
    if masters is not None:
        dtype = torch.float32
    for name in parameter_order(shape, list(owners)):
        whole = {}
        if name in own:
            held = own[name] if masters is None else masters(name, own[name])
            whole = _gathered(name, held, shape, conversion)
        for part, size in plans[owners[name]][name]:
            if stages.size() > 1:
                tensor = whole.get(part.name)
                if tensor is None:
                    tensor = torch.empty(size, device=device, dtype=dtype)
                torch.distributed.broadcast(tensor, ranks[owners[name]], group=stages)
                yield part.name, tensor
            else:
                yield part.name, whole[part.name]


def whole_shapes(
    name: str, parameter: Tensor, shape: DecoderShape, conversion: ShardedConversion
) -> dict[str, tuple[int, ...]]:
    """Of each part of a parameter, by its name in the checkpoint."""
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
