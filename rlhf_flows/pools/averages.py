"""Moving averages of a trained module's weights, for modules that follow it at a distance.

    average <- eta * weights + (1 - eta) * average, once for each policy version

The decision here: the average is the trainer's, not the follower's. It is a function of the
committed versions and lies in every commit beside them: whoever follows may die, come late or skip
versions, and a resumed run averages on to the bit. A follower that averaged for itself would have
to be shown every version once, in order.

It begins at the weights that the trainer begins with, and is kept in the precision that these are
trained in, float32 at the least: a small eta moves a bfloat16 nowhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_flows.errors import ConfigError

__all__ = ["WeightAverages"]

_HALVES = (torch.bfloat16, torch.float16)


class WeightAverages:
    """Of one module: an average for each follower that has an eta."""

    def __init__(self, etas: Mapping[str, float], weights: Iterable[tuple[str, Tensor]]) -> None:
        """
        Args:
            etas: By the name of the follower, in [0, 1].
            weights: What to begin with; looked at only where somebody follows.
        """
        self._etas = dict(etas)
        self._held: dict[str, dict[str, Tensor]] = {}
        if etas:
            first = {name: _precise(tensor) for name, tensor in weights}
            self._held = {name: {n: t.clone() for n, t in first.items()} for name in etas}

    def __iter__(self) -> Iterator[str]:
        """The followers."""
        return iter(self._held)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes in a version. What is no floating-point number is copied."""
        if not self._held:
            return
        for name, tensor in weights:
            for follower, held in self._held.items():
                average, new = held[name], tensor.detach().to(held[name].dtype)
                if average.is_floating_point():
                    # Exact at both ends: 1 gives the weights themselves, 0 leaves the average.
                    average.lerp_(new, self._etas[follower])
                else:
                    average.copy_(new)

    def weights(
        self, follower: str, like: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The average under the names, in the order and the precision of `like`."""
        for name, tensor in like:
            yield name, self._held[follower][name].to(tensor.dtype)

    def export(self, follower: str, like: Iterable[tuple[str, Tensor]], model: Path) -> Path:
        """A Hugging Face folder beside `model`, that of the weights, with the average in it."""
        folder = model.parent / f"average-{follower}"
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors = {n: t.cpu().contiguous() for n, t in self.weights(follower, like)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def save(self, folder: Path) -> None:
        """Into a folder of training state."""
        for follower, held in self._held.items():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
            save_file(tensors, folder / _file(follower))

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote. Raises ConfigError where it wrote nothing, or of others."""
        for follower, held in self._held.items():
            path = folder / _file(follower)
            found = load_file(path) if path.is_file() else {}
            if {n: (t.shape, t.dtype) for n, t in found.items()} != {
                n: (t.shape, t.dtype) for n, t in held.items()
            }:
                raise ConfigError(
                    f"the training state in {str(folder)!r} has no average of these weights for"
                    f" {follower!r}: a run begins with set_parameter_sync(…, eta=…) or goes on"
                    " without; start another run"
                )
            with torch.no_grad():
                for name, tensor in held.items():
                    tensor.copy_(found[name])


def _file(follower: str) -> str:
    return f"average-{follower}.safetensors"


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.dtype in _HALVES else tensor.dtype)
