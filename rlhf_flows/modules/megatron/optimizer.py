"""What a rank's optimizer has of each parameter, whichever of Megatron's optimizers it is.

The decision here: ranges are asked for, never assumed. The distributed optimizer cuts its buffers
with no regard to where parameters begin, so a rank may have all of one, the middle of another and
nothing of a third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from rlhf_flows.errors import ConfigError

__all__ = ["MOMENTS", "HeldRange", "held_ranges"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRange:
    """What this rank's optimizer has of one parameter: the numbers [start, stop) of it, flat."""

    main: Tensor
    """That is stepped: the parameter, its float32 copy, or a range of one of them."""
    optimizer: Any
    """The torch optimizer that steps it."""
    start: int
    stop: int

    def tensors(self, kinds: Sequence[str]) -> tuple[Tensor, int]:
        """[kinds, stop - start] on the CPU, and the number of steps; zeros before the first."""
        state = self.optimizer.state.get(self.main) or {}
        zeros = torch.zeros(self.stop - self.start)
        found = {"master": self.main, **{kind: state.get(kind, zeros) for kind in MOMENTS}}
        rows = [found[kind].detach().reshape(-1).float().cpu() for kind in kinds]
        return torch.stack(rows), int(state.get("step", 0))

    def fill(self, found: Mapping[str, Tensor], step: int) -> None:
        """`found` are by kind, of the whole parameter's number of elements."""
        mine = {kind: t.reshape(-1)[self.start : self.stop] for kind, t in found.items()}
        if "master" in mine:
            self.main.copy_(mine["master"].view_as(self.main))
        # A step of its own for each: torch counts it in place.
        is_fused = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        device = self.main.device if is_fused else "cpu"
        self.optimizer.state[self.main] = {
            "step": torch.tensor(float(step), device=device),
            **{
                kind: torch.empty_like(self.main, requires_grad=False).copy_(
                    mine[kind].view_as(self.main)
                )
                for kind in MOMENTS
            },
        }


def held_ranges(parameters: Mapping[str, Tensor], optimizer: Any) -> dict[str, HeldRange]:
    """By parameter; without those of which other data parallel ranks have all.

    Raises ConfigError for optimizers other than torch's, which keep other things of a parameter.
    """
    held: dict[str, HeldRange] = {}
    names = {id(p): name for name, p in parameters.items()}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            raise ConfigError(
                f"training state is saved of torch's AdamW, and Megatron chose"
                f" {type(inner).__module__}.{type(inner).__name__}: uninstall Transformer Engine"
                " and APEX, whose optimizers it prefers"
            )
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, place) in part.model_param_group_index_map.items():
                owned = part._get_model_param_range_map(parameter)["param"]
                held[names[id(parameter)]] = HeldRange(
                    main=inner.param_groups[group]["params"][place],
                    optimizer=inner,
                    start=owned.start,
                    stop=owned.end,
                )
            continue
        stepped = {id(p) for group in inner.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            main = getattr(parameter, "main_param", parameter)
            if id(main) in stepped:
                held[name] = HeldRange(main=main, optimizer=inner, start=0, stop=main.numel())
    return held
