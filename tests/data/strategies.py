"""Batches of any shape for property-based tests, and what "the same batch" means: equal bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTS = [
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
DTYPES = [*FLOATS, *INTS, torch.bool]
SIZE = {d: torch.empty(0, dtype=d).element_size() for d in DTYPES}

names = st.text(min_size=1, max_size=8) | st.sampled_from(["a.b", "a", "a.list", "x_ids", "é"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3).filter(
            lambda d: set(d) != {"$float"}
        )
    ),
    max_leaves=6,
)


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits at all: NaN payloads, infinities, subnormals, the ends of the ranges."""
    count = math.prod(shape)
    if dtype == torch.bool:
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.bool).reshape(shape)
    raw = draw(st.binary(min_size=count * SIZE[dtype], max_size=count * SIZE[dtype]))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


@st.composite
def columns(draw: Any, size: int) -> Any:
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["flat", "dense", "ragged", "scalars", "json"]))
    if kind == "flat":
        return draw(tensors((size,), dtype))
    if kind == "dense":
        inner = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        return draw(tensors((size, *inner), dtype))
    if kind == "ragged":
        row = st.integers(0, 4).flatmap(lambda n: tensors((n,), dtype))
        return draw(st.lists(row | st.none(), min_size=size, max_size=size))
    if kind == "scalars":
        value = draw(
            st.sampled_from(
                [st.text(), st.binary(), st.integers(), st.floats(), st.booleans(), st.none()]
            )
        )
        return draw(st.lists(value | st.none(), min_size=size, max_size=size))
    return draw(st.lists(json_values, min_size=size, max_size=size))


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    size = draw(st.integers(0, 5))
    keys = draw(st.lists(names, unique=True, max_size=5))
    return {key: draw(columns(size)) for key in keys}


def bits(value: Any) -> Any:
    """The value as something that `==` compares exactly: types, dtypes, shapes and bits."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return ("tensor", str(value.dtype), list(value.shape), raw.tolist())
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else value.hex())
    if isinstance(value, list):
        return ("list", [bits(v) for v in value])
    if isinstance(value, dict):
        return ("dict", [(k, bits(v)) for k, v in value.items()])
    return (type(value).__name__, value)
