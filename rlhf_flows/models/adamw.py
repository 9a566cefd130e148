"""AdamW (arXiv 1711.05101) as the ready-made trainers use it, and its learning-rate schedule.

Two decisions. The schedule is a function of the step and of a horizon fixed in the settings, not
of what happened before, so a resumed run cannot drift from an undisturbed one. And bfloat16 weights
may have float32 masters: AdamW then steps the masters and the weights are their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_flows.settings import OptimizerSettings

__all__ = ["Schedule", "learning_rate_at", "make_adamw", "make_masters", "step_masters"]


def learning_rate_at(step: int, settings: OptimizerSettings) -> float:
    """Of optimizer step `step`, counted from 0; beyond the horizon the last value stays."""
    peak, low = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.total_steps is None:
        return peak
    span = settings.total_steps - settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / span)
    if settings.schedule == "linear":
        return peak + (low - peak) * progress
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Schedule:
    """Counts optimizer steps and sets the learning rate before each."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> None:
        self._optimizer = optimizer
        self._settings = settings
        self.num_steps = 0

    def set_learning_rate(self) -> float:
        """For the step that comes now."""
        rate = learning_rate_at(self.num_steps, self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def step(self) -> None:
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = int(state["num_steps"])


def make_masters(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of the trained parameters, by name."""
    return {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}


def make_adamw(
    model: nn.Module, settings: OptimizerSettings, masters: dict[str, Tensor] | None = None
) -> torch.optim.AdamW:
    """Over the model's parameters, or over `masters`. One fused kernel per step.

    Weight decay leaves out vectors (norms and biases), as is usual.
    """
    named = masters or {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [t for t in named.values() if t.ndim >= 2]
    vectors = [t for t in named.values() if t.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


@torch.no_grad()
def step_masters(
    model: nn.Module, optimizer: torch.optim.Optimizer, masters: dict[str, Tensor]
) -> None:
    """Steps the masters by the model's gradients, which it drops, and rounds them into the model.

    Some at a time, so that their float32 gradients are never there all at once.
    """
    parameters = dict(model.named_parameters())
    for names in _slices(masters):
        for name in names:
            parameter = parameters[name]
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        for name in names:
            parameters[name].copy_(masters[name])
            masters[name].grad = None


_SLICE_ELEMENTS = 2**28
"""Of masters that are stepped together: 1 GiB of gradients."""


def _slices(masters: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, master in masters.items():
        if names and size + master.numel() > _SLICE_ELEMENTS:
            yield names
            names, size = [], 0
        names.append(name)
        size += master.numel()
    yield names
