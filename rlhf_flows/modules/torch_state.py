"""The training state of a torch module as two files: `state.safetensors` and `state.json`.

What is a tensor goes into the first, bit for bit, all else into the second; JSON writes floats so
that they read back equal. Nothing here can run code when it is read, unlike pickle. Rank 0 alone
saves: random states are those of the rank that loads, where it is rank 0 of one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.state_pieces import PieceReader

__all__ = [
    "load_pieces",
    "load_training_state",
    "own_tensors",
    "random_state",
    "save_training_state",
    "set_random_state",
    "state_as_json",
    "state_from_json",
]

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
            "state": state_as_json(state["state"], "optimizer", found),
            "param_groups": state_as_json(state["param_groups"], "groups", found),
        }
    if lr_scheduler is not None:
        rest["lr_scheduler"] = state_as_json(lr_scheduler.state_dict(), "lr_scheduler", found)
    rest["random"] = random_state(found)
    save_file(own_tensors(found), folder / _TENSORS)
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
        groups = state_from_json(rest["optimizer"]["param_groups"], found)
        state = state_from_json(rest["optimizer"]["state"], found)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(state_from_json(rest["lr_scheduler"], found))
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[f"extra/{name}"])
    set_random_state(rest["random"], found)


@torch.no_grad()
def load_pieces(
    folder: Path,
    *,
    stepped: Mapping[str, Tensor],
    split: Callable[[str, Tensor], Sequence[tuple[str, Tensor]]],
    merge: Callable[[str, Sequence[Tensor]], Tensor],
    optimizer: Any,
    lr_scheduler: Any,
    tensors: Mapping[str, Tensor],
    are_masters: bool,
) -> None:
    """Takes the state that the ranks of a sharded module wrote (`modules/state_pieces.py`), where
    the optimizer is AdamW. Random states stay: those are of other processes.

    Args:
        stepped: What the optimizer steps, by the name of the running model's parameter.
        split, merge: As of `Conversion`.
        tensors: What else training needs; filled in place.
        are_masters: Whether `stepped` are float32 copies of the weights.

    Raises ConfigError, with nothing changed, where it belongs to other parameters.
    """
    reader = PieceReader(folder)
    kinds = [*(["master"] if are_masters else []), "exp_avg", "exp_avg_sq"]
    slices = {
        name: [reader.whole(part, piece.shape) for part, piece in split(name, tensor)]
        for name, tensor in stepped.items()
    }
    reader.check([s for found in slices.values() for s in found], kinds)
    extra = reader.extra(tensors)
    is_fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for name, tensor in stepped.items():
        parts = [reader.read(where, kinds) for where in slices[name]]
        whole = {kind: merge(name, [found[kind] for found, _ in parts]) for kind in kinds}
        if are_masters:
            tensor.copy_(whole["master"])
        steps = torch.tensor(float(parts[0][1]), device=tensor.device if is_fused else "cpu")
        moments = {k: torch.empty_like(tensor, requires_grad=False) for k in kinds[-2:]}
        for kind, moment in moments.items():
            moment.copy_(whole[kind])
        optimizer.state[tensor] = {"step": steps, **moments}
    lr_scheduler.load_state_dict(reader.about["lr_scheduler"])
    for name, tensor in tensors.items():
        tensor.copy_(extra[name])


def own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    counts = [len(g["params"]) for g in state_from_json(saved, {}, tensors=False)]
    own = [len(g["params"]) for g in optimizer.param_groups]
    if counts != own:
        raise ConfigError(
            f"the optimizer state in {str(folder)!r} is of {counts} parameters per group, this"
            f" optimizer has {own}: it belongs to another model"
        )


def state_as_json(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`, its tensors put aside under `key`.

    Containers become tagged lists, because JSON has neither tuples nor keys that are numbers.
    """
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"t": key}
    if isinstance(value, Mapping):
        return {"d": [[k, state_as_json(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [state_as_json(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{key} is a {type(value).__name__}, which cannot be saved without pickle: keep tensors,"
        " numbers, strings, lists and dicts in the state of optimizers and schedules"
    )


def state_from_json(value: Any, found: Mapping[str, Tensor], *, tensors: bool = True) -> Any:
    """What `state_as_json` was given; without `tensors` None stands in place of each."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return found[content] if tensors else None
    if kind == "d":
        return {k: state_from_json(v, found, tensors=tensors) for k, v in content}
    items = [state_from_json(v, found, tensors=tensors) for v in content]
    return items if kind == "l" else tuple(items)


def random_state(found: dict[str, Tensor]) -> dict[str, Any]:
    """Of torch, numpy and python in this process: JSON, the tensors put aside in `found`."""
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


def set_random_state(rest: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Takes back what `random_state` gave."""
    torch.set_rng_state(found["random/torch"])
    if "random/cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["random/cuda"])
    name, position, has_gauss, gauss = rest["numpy"]
    keys = found["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    version, state, gauss_next = rest["python"]
    random.setstate((version, tuple(state), gauss_next))
