"""Whole weights taken by the ranks of a Megatron model, each its share.

The decision here: all ranks look at everything before any of them changes anything. A rank copies
out its share of each weight as it passes by, so it holds its own part twice and never the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from rlhf_flows.errors import SyncError
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.megatron.conversion import ShardedConversion
from rlhf_flows.modules.megatron.weights import global_parameters, share_of, whole_shapes

__all__ = ["take_weights"]

_SHOWN = 8


@torch.no_grad()
def take_weights(
    decoders: Sequence[Any],
    shape: DecoderShape,
    conversion: ShardedConversion,
    weights: Iterable[tuple[str, Tensor]],
    *,
    extra: Mapping[str, Tensor],
    module: str,
) -> None:
    """Collective: every rank, each given all of the weights under their checkpoint's names.

    `extra` are tensors that every rank has, filled in place from the weights of their names.
    Raises SyncError, with nothing changed on any rank, unless all fit.
    """
    own = global_parameters(decoders)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in extra.items()
    }
    for name, parameter in own.items():
        whole = whole_shapes(name, parameter, shape, conversion)
        kinds |= {part: (str(parameter.dtype), size) for part, size in whole.items()}
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, kinds)
    expected = {name: kind for some in everywhere for name, kind in some.items()}
    problems, kept = _kept(weights, expected, own, conversion, extra)
    torch.distributed.all_gather_object(everywhere, problems)
    found = sorted({problem for some in everywhere for problem in some})
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise SyncError(
            f"module {module!r} cannot take these weights: {'; '.join(found[:_SHOWN])}{more}."
            " Nothing was changed: send the weights of the same model in the same dtype"
        )
    for name, parameter in own.items():
        parts = [kept[part.name] for part in conversion.parts(name)]
        parameter.copy_(conversion.merge(name, parts))
    for name, tensor in extra.items():
        tensor.copy_(kept[name])


def _kept(
    weights: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
    own: Mapping[str, Tensor],
    conversion: ShardedConversion,
    extra: Mapping[str, Tensor],
) -> tuple[list[str], dict[str, Tensor]]:
    """What is wrong with the weights; and this rank's share of each that it has a part of."""
    wanted = {
        part.name: (part, name, len(parameter))
        for name, parameter in own.items()
        for part in conversion.parts(name)
    }
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    problems: list[str] = []
    kept: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, tensor in weights:
        kind = (str(tensor.dtype), tuple(tensor.shape))
        if name in seen:
            problems.append(f"{name} came twice")
        elif name not in expected:
            problems.append(f"{name} is not in the model")
        elif kind != expected[name]:
            problems.append(f"{name} is {_said(kind)}, expected {_said(expected[name])}")
        elif name in extra:
            kept[name] = tensor.clone()
        elif name in wanted:
            part, parameter, rows = wanted[name]
            kept[name] = share_of(tensor, part, parameter, rank=rank, size=size, rows=rows).clone()
        seen.add(name)
    problems += [f"{name} is missing" for name in expected if name not in seen]
    return problems, kept


def _said(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0].removeprefix('torch.')} {list(kind[1])}"
