"""What a campaign can be made of: an engine, the points of its processes, and who is to die there.

A new kind is an entry of `KINDS`; its flag, its undisturbed run and its audit come by themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_flows.engine import Engine
from tests.chaos.points import POINTS, RANK_POINTS

__all__ = ["KINDS", "SECOND_RANK", "Kind"]

SECOND_RANK = "trainer rank 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    what: str
    """For whoever asks for help."""
    engine: str
    """`module:function` that makes it, given the folder in which orders are looked for."""
    points: tuple[tuple[str, str], ...] = POINTS
    """(who, where) in turn, from seed to seed."""
    in_turn: int = 1
    """How many of them one seed takes."""
    victims: tuple[str, ...] = ("flow", "policy", "reward", "trainer")
    """Who may die at a random time."""
    ranks: int = 1
    """Of the trainer, in every seed and in the undisturbed run."""
    ranks_of_some: int = 1
    """Of the trainer, in every fifth seed: ranks that all do the same, so that the bits are those
    of one."""
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Settings, beside those of the campaign."""

    @property
    def staleness(self) -> int:
        return int(self.runtime.get("max_staleness", 0))

    def load(self) -> Callable[[Path], Engine]:
        module, _, function = self.engine.partition(":")
        made: Callable[[Path], Any] = getattr(importlib.import_module(module), function)
        return made

    def ranks_of(self, seed: int) -> int:
        """Of the trainer."""
        return max(self.ranks, self.ranks_of_some if seed % 5 == 4 else 1)


KINDS = {
    "toys": Kind(
        what="toys: seconds a run",
        engine="tests.chaos.toys:chaos_engine",
        ranks_of_some=2,
    ),
    "ahead": Kind(
        what="toys, trained while the checkpoint before is on its way",
        engine="tests.chaos.toys:chaos_engine",
        ranks_of_some=2,
        runtime={"max_staleness": 1},
    ),
    "ranks": Kind(
        what="toys, the trainer's gradients summed over two ranks",
        engine="tests.chaos.toys:ranks_engine",
        points=RANK_POINTS,
        in_turn=2,
        victims=("flow", "policy", "trainer", SECOND_RANK),
        ranks=2,
    ),
    "megatron": Kind(
        what="GRPO, the trainer's layers shared by two ranks of Megatron",
        engine="tests.chaos.megatron:megatron_engine",
        points=RANK_POINTS,
        in_turn=2,
        victims=("flow", "policy", "trainer", SECOND_RANK),
        ranks=2,
    ),
    "real": Kind(
        what="vLLM and the torch trainer, no toys",
        engine="tests.chaos.real:real_engine",
    ),
    "rlhf": Kind(
        what="PPO with six models, vLLM among them",
        engine="tests.chaos.real:rlhf_engine",
        victims=(
            *("flow", "policy", "reward", "trainer"),
            *("reference", "value", "value_trainer"),
        ),
    ),
}
