"""PPO's policy and value, and a reward model, train on Megatron as on plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.megatron.agreement import CHECKS, SCALAR, TOPOLOGIES, Plain, agrees
from tests.megatron.ranks import Ranks

ALGORITHMS = ["ppo", *SCALAR]
SHOWN = ("TP2 x DP2, optimizer shared", "TP2 x PP2, SP")
Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    "name",
    [
        # The others are long tests: their parts are in these two, and in test_roles.py.
        name if name in SHOWN else pytest.param(name, marks=pytest.mark.long)
        for name in TOPOLOGIES
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_topology_trains_as_plain_torch_does_and_reports_the_same(
    algorithm: str,
    name: str,
    ranks: Ranks,
    plain: Plain,
    decoder_folder: Folder,
    scalar_folder: Folder,
) -> None:
    """With PPO's policy, old logprobs of two of three updates come from passes without gradient."""
    topology, options = TOPOLOGIES[name]
    log, file = plain("qwen2, tied", algorithm)
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=topology.world_size,
        algorithm=algorithm,
        folder=str((scalar_folder if algorithm in SCALAR else decoder_folder)("qwen2, tied")),
        topology=topology,
        sizes=[1, 3, 2, 1],
        weights_file=file,
        **options,
    )
    agrees(found, log)
    if algorithm == "ppo":
        assert all(abs(step["ratio"] - 1.0) > 1e-4 for step in log[1:])
