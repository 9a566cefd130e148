"""Moving averages of a trained module's weights, for modules that follow it at a distance.

    average <- eta * weights + (1 - eta) * average, once for each policy version

The decision here: the average is the trainer's, not the follower's. It is a function of the
committed versions and lies in every commit beside them: whoever follows may die, come late or skip
versions, and a resumed run averages on to the bit. A follower that averaged for itself would have
to be shown every version once, in order.

Where the ranks of a trainer hold different parts of it, the first alone keeps the average, on the
CPU; the others take part in what gathers the weights.

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
from rlhf_flows.modules.hf_export import write_weights

__all__ = ["WeightAverages"]

_HALVES = (torch.bfloat16, torch.float16)


class WeightAverages:
    """Of one module: an average for each follower that has an eta."""

    def __init__(
        self,
        etas: Mapping[str, float],
        weights: Iterable[tuple[str, Tensor]],
        *,
        is_sharded: bool = False,
        rank: int = 0,
    ) -> None:
        """
        Args:
            etas: By the name of the follower, in [0, 1].
            weights: What to begin with; looked at only where somebody follows.
            is_sharded: Whether the ranks hold different parts, so that `weights`, here and below,
                are iterated by all of them together.
        """
        self._etas = dict(etas)
        self._keeps = rank == 0 or not is_sharded
        self._held: dict[str, dict[str, Tensor]] = {name: {} for name in etas}
        for name, tensor in weights if etas else ():
            for held in self._held.values() if self._keeps else ():
                held[name] = _precise(tensor.cpu() if is_sharded else tensor).clone()

    def __iter__(self) -> Iterator[str]:
        """The followers."""
        return iter(self._etas)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes in a version. What is no floating-point number is copied."""
        if not self._held:
            return
        for name, tensor in weights:
            for follower, held in self._held.items() if self._keeps else ():
                average, new = held[name], tensor.detach().to(held[name])
                if average.is_floating_point():
                    # Exact at both ends: 1 gives the weights themselves, 0 leaves the average.
                    average.lerp_(new, self._etas[follower])
                else:
                    average.copy_(new)

    def weights(
        self, follower: str, like: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The average under the names, in the order and the precision of `like`; on a rank that
        keeps none `like` itself, which nobody is to look at.
        """
        for name, tensor in like:
            yield name, self._held[follower][name].to(tensor.dtype) if self._keeps else tensor

    def export(self, follower: str, like: Iterable[tuple[str, Tensor]], model: Path) -> Path:
        """A Hugging Face folder beside `model`, that of the weights, with the average in it."""
        folder = model.parent / f"average-{follower}"
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        write_weights(self.weights(follower, like), folder)
        return folder

    def files(self) -> list[str]:
        """What `save` writes, and `load` reads, on this rank."""
        return [_file(follower) for follower in self._held] if self._keeps else []

    def save(self, folder: Path) -> None:
        """Into a folder of training state."""
        for follower, held in self._held.items() if self._keeps else ():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
            save_file(tensors, folder / _file(follower))

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote. Raises ConfigError where it wrote nothing, or of others."""
        for follower, held in self._held.items() if self._keeps else ():
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
