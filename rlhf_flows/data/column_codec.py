"""One column of a batch as one Arrow array, and back: the table in arrow.py, line by line.

The decision here: an array never says by its values how it is to be read. What its type cannot
say stands beside it, in a small dict {kind, dtype, shape}, so that an empty column comes back as
exactly as a full one. Letters: B samples, T numbers of a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rlhf_flows.data.json_text import from_json_text, to_json_text
from rlhf_flows.errors import DataDamageError, DataError

__all__ = ["decode", "encode", "guess"]

_AS_THEY_ARE = {
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
}
_FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}
_DTYPES = {str(d).removeprefix("torch."): d for d in _AS_THEY_ARE | _FLOAT8 | {torch.bfloat16}}
_SCALARS = {
    str: pa.string(),
    bytes: pa.binary(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
}
_OFFSET_LIMIT = 2**31 - 1


def encode(name: str, column: Any) -> tuple[pa.Array, dict[str, Any]]:
    """The array, and what its type does not say. Raises DataError naming column and row."""
    if isinstance(column, Tensor):
        shape = list(column.shape)
        array = _to_values(name, column.reshape(-1))
        for level in range(len(shape) - 1, 0, -1):
            count = int(np.prod(shape[:level], dtype=np.int64))
            offsets = np.arange(count + 1, dtype=np.int64) * shape[level]
            array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), array)
        return array, {"kind": "tensor", "dtype": _dtype_name(column), "shape": shape[1:]}
    values = list(column)
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, Tensor) for v in present):
        return _encode_ragged(name, values)
    kinds = {type(v) for v in present}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in _SCALARS and (kind is not int or all(-(2**63) <= v < 2**63 for v in present)):
        return _encode_scalars(name, values, _SCALARS[kind]), {"kind": "list"}
    texts = [
        None if v is None else to_json_text(v, where=f"column {name!r}, row {row}")
        for row, v in enumerate(values)
    ]
    return _encode_scalars(name, texts, pa.string()), {"kind": "json"}


def _encode_ragged(name: str, values: list[Tensor | None]) -> tuple[pa.Array, dict[str, Any]]:
    present = [v for v in values if v is not None]
    first = present[0]
    # Rows come by the hundred: what is asked of each of them is asked in one pass.
    if {(v.ndim, v.dtype) for v in present} != {(1, first.dtype)}:
        row, odd = next(
            (row, v)
            for row, v in enumerate(values)
            if v is not None and (v.ndim != 1 or v.dtype != first.dtype)
        )
        raise DataError(
            f"column {name!r} holds a {odd.dtype} of shape {list(odd.shape)} in row {row} "
            f"and a {first.dtype} of shape {list(first.shape)} before: a list of tensors "
            "holds 1-D tensors of one dtype; stack equal shapes into one tensor"
        )
    if any(v.device != first.device for v in present):
        present = [v.cpu() for v in present]
    with torch.no_grad():
        flat = torch.cat(present)
    offsets = pa.array(
        np.cumsum([0, *(0 if v is None else len(v) for v in values)], dtype=np.int32)
    )
    missing = [v is None for v in values] if len(present) < len(values) else None
    mask = None if missing is None else pa.array(missing)
    array = pa.ListArray.from_arrays(offsets, _to_values(name, flat), mask=mask)
    return array, {"kind": "ragged", "dtype": _dtype_name(first)}


def _encode_scalars(name: str, values: list[Any], type: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type)
    except UnicodeEncodeError as e:
        row = next(i for i, v in enumerate(values) if v is not None and not _is_unicode(v))
        raise DataError(
            f"column {name!r}, row {row} holds half of a surrogate pair ({e.reason}), which no "
            "text file can: clean the text with .encode('utf-8', 'replace').decode()"
        ) from e


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_values(name: str, flat: Tensor) -> pa.Array:
    """A tensor [T] as an array of its numbers; shares memory where Arrow has the dtype."""
    if flat.numel() > _OFFSET_LIMIT:
        raise DataError(
            f"column {name!r} has {flat.numel()} numbers, a shard holds {_OFFSET_LIMIT} at most: "
            "use smaller shards"
        )
    flat = flat.detach().cpu().contiguous()
    if flat.dtype == torch.bfloat16:
        # By bits: a conversion would change the payload of a NaN.
        flat = (flat.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    elif flat.dtype in _FLOAT8:
        flat = flat.to(torch.float32)
    elif flat.dtype not in _AS_THEY_ARE:
        raise DataError(
            f"column {name!r} is {flat.dtype}, which no column can hold: "
            "use a float, int or bool dtype (for complex numbers, torch.view_as_real)"
        )
    return pa.array(flat.numpy())


def guess(array: pa.Array) -> dict[str, Any]:
    """What a column written by others is."""
    type = array.type
    if array.null_count == 0:
        if _is_number(type):
            return {"kind": "tensor", "dtype": _dtype_of(type), "shape": []}
        if _is_list(type) and _is_number(type.value_type) and array.flatten().null_count == 0:
            return {"kind": "ragged", "dtype": _dtype_of(type.value_type)}
    return {"kind": "list"}


def _is_list(type: pa.DataType) -> bool:
    return bool(pa.types.is_list(type) or pa.types.is_large_list(type))


def _is_number(type: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type)
    )


def _dtype_of(type: pa.DataType) -> str:
    return "bool" if pa.types.is_boolean(type) else str(type.to_pandas_dtype().__name__)


def decode(array: pa.Array, says: Mapping[str, Any], *, zero_copy: bool) -> Any:
    """The column that `encode` was given. `zero_copy`: tensors may share the memory of `array`."""
    if says["kind"] == "tensor":
        size = len(array)
        for _ in says["shape"]:
            array = array.flatten()  # not .values, which does not know of slices
        return _to_tensor(array, _dtype(says["dtype"]), zero_copy).reshape([size, *says["shape"]])
    if says["kind"] == "ragged":
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_pylist()
        flat = _to_tensor(array.flatten(), _dtype(says["dtype"]), zero_copy)
        rows: list[Tensor | None] = list(flat.split(lengths)) if lengths else []
        if array.null_count:
            for row in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)):
                rows[row] = None
        return rows
    values = array.to_pylist()
    if says["kind"] == "json":
        return [None if v is None else from_json_text(v) for v in values]
    return values


def _to_tensor(array: pa.Array, dtype: torch.dtype, zero_copy: bool) -> Tensor:
    if dtype == torch.bool:
        return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    stored = from_dlpack(array)
    if dtype == torch.bfloat16:
        return (stored.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    if stored.dtype != dtype:
        return stored.to(dtype)
    return stored if zero_copy else stored.clone()


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise DataDamageError(
            f"a column of dtype {name!r} was found, this version knows {', '.join(_DTYPES)}: "
            "read it with the version that wrote it"
        )
    return _DTYPES[name]
