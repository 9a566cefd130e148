"""Ranks share a batch by its tokens; whatever falls to each, gradients are the same, and all meet
in the same collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.agreement import LOSS, RELATIVE_NORM, SCALAR, WEIGHTS
from tests.megatron.ranks import Ranks

DP3 = Topology(world_size=3)
TP2_DP2 = Topology(world_size=4, tensor_parallel=2, sequence_parallel=True)
PP2_DP2 = Topology(world_size=4, pipeline_parallel=2)
VPP2_DP2 = Topology(world_size=4, pipeline_parallel=2, virtual_pipeline=2)


TOKENS, ROWS = "train_micro_batch_tokens", "train_micro_batch_size"


@pytest.mark.parametrize(
    ("algorithm", "topology", "num_rows", "micro_batches", "num_parts"),
    [
        ("sft", None, 7, {ROWS: 1}, [3, 2, 2]),
        ("sft", None, 2, {TOKENS: 25}, [1, 1, 0]),
        ("sft", DP3, 7, {ROWS: 1}, [3, 2, 2]),
        ("value", DP3, 2, {TOKENS: 25}, [1, 1, 0]),
        ("reward", DP3, 2, {TOKENS: 4096}, [1, 1, 0]),
        ("grpo", TP2_DP2, 6, {ROWS: 2}, [2, 1]),
        ("sft", TP2_DP2, 1, {TOKENS: 4096}, [1, 0]),
        ("value", TP2_DP2, 1, {TOKENS: 4096}, [1, 0]),
        ("sft", PP2_DP2, 5, {ROWS: 1}, [3, 2]),
        ("value", VPP2_DP2, 5, {ROWS: 1}, [3, 2]),
    ],
)
def test_whatever_falls_to_a_rank_gradients_and_collectives_are_the_same(
    algorithm: str,
    topology: Topology | None,
    num_rows: int,
    micro_batches: dict[str, int],
    num_parts: list[int],
    ranks: Ranks,
    decoder_folder: Callable[[str], Path],
    scalar_folder: Callable[[str], Path],
) -> None:
    found = ranks.run(
        "tests.megatron.balance_checks:steps",
        world_size=3 if topology is None else topology.world_size,
        folder=str((scalar_folder if algorithm in SCALAR else decoder_folder)("qwen2, tied")),
        algorithm=algorithm,
        num_rows=num_rows,
        micro_batches=micro_batches,
        topology=topology,
    )
    model_ranks = 1 if topology is None else topology.world_size // topology.data_parallel
    for step in range(3):
        numbers = sorted((len(rank["parts"][step]) for rank in found), reverse=True)
        assert numbers[::model_ranks] == num_parts
    assert sum(found[0]["calls"].values()) > 0
    for rank in found:
        assert rank["calls"] == found[0]["calls"]
        assert rank["weights"] < WEIGHTS
        for step, expected in zip(rank["log"], rank["expected"], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], abs=LOSS)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=RELATIVE_NORM)
            assert step == pytest.approx(expected, rel=2e-5, abs=2e-5)
