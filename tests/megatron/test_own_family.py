"""A family that a program registered is built by Megatron as those that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.ranks import Ranks
from tests.megatron.tiny_decoders import SIZES
from tests.models.families.tiny_families import build

CUTS = [
    Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
    Topology(world_size=4),
]


@pytest.mark.parametrize("bias", [True, False])
def test_one_file_makes_a_family_that_megatron_builds(
    bias: bool, ranks: Ranks, tmp_path: Path
) -> None:
    folder = str(build(tmp_path, "SeedOssForCausalLM", {**SIZES, "attention_bias": bias}))
    for check, more in (
        ("logits_and_weights", {}),
        ("scores_and_weights", {"head_init": "small", "sizes": [3, 4]}),
    ):
        found = ranks.run(
            f"tests.megatron.own_family:{check}",
            world_size=4,
            folder=folder,
            topologies=CUTS,
            **more,
        )
        for answer in (cut for rank in found for cut in rank):
            assert answer["wrong"] == []
            differences = answer.get("scores", {"logits": answer.get("logits")}).values()
            assert all(d is None or d < 1e-5 for d in differences)
        assert any(rank[1].get("logits") is not None or "scores" in rank[1] for rank in found)
