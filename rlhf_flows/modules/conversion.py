"""Between the parameters a model runs with and what its checkpoint holds: names and shapes.

The decision here: a conversion speaks of one parameter at a time, so that weights are sent and
taken without a second model in memory. Which families have one, and for which backend, is the
affair of `rlhf_flows.models.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Conversion"]


class Conversion(Protocol):
    """`merge(name, split(name, x))` is `x`, bit for bit, for every parameter of a model."""

    def split(self, name: str, tensor: Tensor) -> Sequence[tuple[str, Tensor]]:
        """What a checkpoint holds of the running model's `name`; views where it can be."""

    def merge(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The running model's `name` from a checkpoint's tensors, in the order of `split`."""
