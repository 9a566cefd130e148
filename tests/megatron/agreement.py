"""What it means that ranks trained as plain torch does, and the topologies that is asked of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_flows.modules.megatron.topology import Topology

CHECKS = "tests.megatron.training_checks"
LOSS, RELATIVE_NORM, WEIGHTS = 2e-6, 2e-6, 2e-5
"""Largest differences; a step moves weights by about 1e-3."""

SCALAR = ("value", "value, normalized", "reward")
"""Algorithms of models with a scalar head."""

Plain = Callable[..., tuple[list[dict[str, float]], str]]


def agrees(found: list[dict[str, Any]], log: list[dict[str, float]]) -> None:
    for rank in found:
        for step, expected in zip(rank["log"], log, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], abs=LOSS)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=RELATIVE_NORM)
            assert step["learning_rate"] == expected["learning_rate"]
            assert step == pytest.approx(expected, rel=2e-5, abs=2e-5)
        assert rank["moved"] > 20 * WEIGHTS
        assert rank["weights"] < WEIGHTS


TOPOLOGIES: dict[str, tuple[Topology, dict[str, Any]]] = {
    "one rank": (Topology(), {}),
    "one rank, activations again": (Topology(), {"recompute": True}),
    "TP2": (Topology(world_size=2, tensor_parallel=2), {}),
    "TP2, SP": (Topology(world_size=2, tensor_parallel=2, sequence_parallel=True), {}),
    "PP2": (Topology(world_size=2, pipeline_parallel=2), {}),
    "PP2, VPP2": (Topology(world_size=2, pipeline_parallel=2, virtual_pipeline=2), {}),
    "DP2": (Topology(world_size=2), {}),
    "DP2, optimizer shared": (Topology(world_size=2), {"distributed_optimizer": True}),
    "TP2 x DP2, optimizer shared": (
        Topology(world_size=4, tensor_parallel=2),
        {"distributed_optimizer": True},
    ),
    "TP2 x PP2, SP": (
        Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
        {},
    ),
}
