"""The scale of a value model whose outputs are normalized: three tensors that go wherever its
weights go, in a param sync, in a commit, in the folder that it is saved to.

The decision here: they stand in a file of their own beside the weights. Other readers of a Hugging
Face folder load the model as ever (its outputs are the normalized ones) and never look at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_flows.algorithms.value_norm import RunningMoments
from rlhf_flows.errors import ConfigError
from rlhf_flows.settings import PPOSettings

__all__ = [
    "MEAN",
    "STD",
    "check_scale",
    "is_scale",
    "make_moments",
    "read_scale",
    "scale_tensors",
    "take_off",
    "write_scale",
]

_PREFIX = "value_norm."
MEAN, STD = f"{_PREFIX}mean", f"{_PREFIX}std"
_FILE = "value_norm.safetensors"


def make_moments(settings: PPOSettings) -> RunningMoments | None:
    """Of returns, as the settings ask for them."""
    if settings.value_norm == "none":
        return None
    return RunningMoments(
        settings.value_norm, beta=settings.value_norm_beta, eps=settings.value_norm_eps
    )


def scale_tensors(moments: RunningMoments | None) -> dict[str, Tensor]:
    """The statistics under their names: the tensors themselves, [1] in float64."""
    if moments is None:
        return {}
    return {
        MEAN: moments.mean,
        STD: moments.std,
        f"{_PREFIX}total": moments.total,
        f"{_PREFIX}total_square": moments.total_square,
        f"{_PREFIX}weight": moments.weight,
    }


def is_scale(name: str) -> bool:
    """Whether this is one of the scale's tensors."""
    return name.startswith(_PREFIX)


def take_off(
    weights: Iterable[tuple[str, Tensor]], scale: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The weights without the scale, which is copied into `scale`."""
    for name, tensor in weights:
        if is_scale(name):
            scale[name] = tensor.clone()
        else:
            yield name, tensor


def write_scale(folder: Path, moments: RunningMoments | None) -> None:
    if moments is not None:
        tensors = {name: tensor.clone() for name, tensor in scale_tensors(moments).items()}
        save_file(tensors, folder / _FILE, metadata={"value_norm": moments.kind})


def read_scale(folder: Path) -> Mapping[str, Tensor]:
    """Of the model in a folder; empty where its outputs are not normalized."""
    if not (folder / _FILE).is_file():
        return {}
    with safe_open(folder / _FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def check_scale(folder: Path, settings: PPOSettings, *, module: str) -> None:
    """Raises ConfigError where training cannot go on from the statistics in a folder."""
    if not (folder / _FILE).is_file():
        return
    with safe_open(folder / _FILE, framework="pt") as file:
        kind = (file.metadata() or {}).get("value_norm")
    if kind != settings.value_norm:
        raise ConfigError(
            f"the value model in {str(folder)!r} was trained with value_norm={kind!r}, and module"
            f" {module!r} has value_norm={settings.value_norm!r}: its outputs mean nothing without"
            " their scale, so set the same"
        )
