"""The training state of a torch module as two files: `state.safetensors` and `state.json`.

What is a tensor goes into the first, bit for bit, all else into the second; JSON writes floats so
that they read back equal. Nothing here can run code when it is read, unlike pickle. Rank 0 alone
saves: random states are those of the rank that loads, where it is rank 0 of one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_flows.errors import ConfigError

__all__ = ["load_training_state", "save_training_state"]

_TENSORS, _REST = "state.safetensors", "state.json"


def save_training_state(
    folder: Path, *, optimizer: Any, lr_scheduler: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Writes both files into `folder`. Raises ConfigError for what is neither tensor nor JSON."""
    found: dict[str, Tensor] = {f"extra/{name}": t for name, t in tensors.items()}
    rest: dict[str, Any] = {"optimizer": None, "lr_scheduler": None, "random": {}}
    if optimizer is not None:
        state = optimizer.state_dict()
        rest["optimizer"] = {
            "state": _split(state["state"], "optimizer", found),
            "param_groups": _split(state["param_groups"], "groups", found),
        }
    if lr_scheduler is not None:
        rest["lr_scheduler"] = _split(lr_scheduler.state_dict(), "lr_scheduler", found)
    rest["random"] = _random_state(found)
    save_file(_on_their_own(found), folder / _TENSORS)
    (folder / _REST).write_text(json.dumps(rest), "utf-8")


def load_training_state(
    folder: Path, *, optimizer: Any, lr_scheduler: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Takes back what `save_training_state` wrote; `tensors` are filled in place.

    Raises ConfigError where the files are missing or belong to other parameters.
    """
    if not (folder / _REST).exists() or not (folder / _TENSORS).exists():
        raise ConfigError(
            f"{str(folder)!r} holds no training state ({_REST} and {_TENSORS}): give a folder that"
            " save_state wrote"
        )
    found = load_file(folder / _TENSORS)
    rest = json.loads((folder / _REST).read_text("utf-8"))
    for name, tensor in tensors.items():
        saved = found.get(f"extra/{name}")
        if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise ConfigError(
                f"the training state in {str(folder)!r} has no {name!r} of shape"
                f" {list(tensor.shape)} in {tensor.dtype}: it belongs to another model or setting"
            )
    for part, held in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if (rest[part] is None) != (held is None):
            has, lacks = (
                ("the module", "the state") if held is not None else ("the state", "the module")
            )
            raise ConfigError(
                f"{has} has an {part} and {lacks} in {str(folder)!r} has none: resume with the"
                " same kind of module"
            )
    if optimizer is not None:
        _check_groups(rest["optimizer"]["param_groups"], optimizer, folder)
        groups = _join(rest["optimizer"]["param_groups"], found)
        state = _join(rest["optimizer"]["state"], found)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(_join(rest["lr_scheduler"], found))
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[f"extra/{name}"])
    _set_random_state(rest["random"], found)


def _on_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and copied where they share memory or have gaps, which safetensors refuses."""
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.nbytes() != t.nbytes or storage.data_ptr() in seen:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        whole[name] = t
    return whole


def _check_groups(saved: Any, optimizer: Any, folder: Path) -> None:
    counts = [len(g["params"]) for g in _join(saved, {}, tensors=False)]
    own = [len(g["params"]) for g in optimizer.param_groups]
    if counts != own:
        raise ConfigError(
            f"the optimizer state in {str(folder)!r} is of {counts} parameters per group, this"
            f" optimizer has {own}: it belongs to another model"
        )


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`, its tensors put aside under `key`.

    Containers become tagged lists, because JSON has neither tuples nor keys that are numbers.
    """
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"t": key}
    if isinstance(value, Mapping):
        return {"d": [[k, _split(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_split(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{key} is a {type(value).__name__}, which cannot be saved without pickle: keep tensors,"
        " numbers, strings, lists and dicts in the state of optimizers and schedules"
    )


def _join(value: Any, found: Mapping[str, Tensor], *, tensors: bool = True) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return found[content] if tensors else None
    if kind == "d":
        return {k: _join(v, found, tensors=tensors) for k, v in content}
    items = [_join(v, found, tensors=tensors) for v in content]
    return items if kind == "l" else tuple(items)


def _random_state(found: dict[str, Tensor]) -> dict[str, Any]:
    found["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found["random/cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    found["random/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, state, gauss_next = random.getstate()
    return {
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(state), gauss_next],
    }


def _set_random_state(rest: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(found["random/torch"])
    if "random/cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["random/cuda"])
    name, position, has_gauss, gauss = rest["numpy"]
    keys = found["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, state, gauss_next = rest["python"]
    random.setstate((version, tuple(state), gauss_next))
