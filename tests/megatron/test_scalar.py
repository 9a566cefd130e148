"""Models with a scalar head on Megatron: the same scores and weights as in torch, at every cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.ranks import Ranks

CHECKS = "tests.megatron.scalar_checks"
LARGEST_DIFFERENCE = 1e-5
CUTS = [
    Topology(world_size=4),
    Topology(world_size=4, tensor_parallel=2, sequence_parallel=True),
    Topology(world_size=4, pipeline_parallel=2, virtual_pipeline=2),
    Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
    Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
]
VARIANTS = ["llama, biases, tied", "qwen2", "qwen2, windows in some layers", "qwen3, tied", "gemma"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["with its head", "causal, head small"])
def test_scores_are_those_of_torch_and_weights_come_out_bit_for_bit(
    kind: str,
    variant: str,
    ranks: Ranks,
    decoder_folder: Callable[[str], Path],
    scalar_folder: Callable[[str], Path],
) -> None:
    """A folder's own head is taken, a new one is as in torch; the vocabulary's is gone."""
    is_causal = kind.startswith("causal")
    found = ranks.run(
        f"{CHECKS}:scores_and_weights",
        world_size=4,
        folder=str((decoder_folder if is_causal else scalar_folder)(variant)),
        # Wrong for a folder that has a head, which must not be overwritten.
        head_init="small" if is_causal else "zero",
        topologies=CUTS,
        sizes=[1, 3, 2, 1],
    )
    for i, topology in enumerate(CUTS):
        for rank in found:
            assert max(rank[i]["scores"].values()) < LARGEST_DIFFERENCE, topology
            assert rank[i]["wrong"] == [], topology
            assert rank[i]["order"] == found[0][0]["order"]
            assert rank[i]["order"][-1] == "score.weight"


def test_a_new_head_of_zero_gives_zero(ranks: Ranks, decoder_folder: Callable[[str], Path]) -> None:
    (found,) = ranks.run(
        f"{CHECKS}:scores_and_weights",
        folder=str(decoder_folder("qwen2")),
        head_init="zero",
        topologies=[Topology()],
        sizes=[7],
    )
    assert set(found[0]["scores"].values()) == {0.0}


@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(world_size=3),
        Topology(world_size=4, tensor_parallel=2),
        Topology(world_size=4, pipeline_parallel=2, virtual_pipeline=2),
    ],
    ids=["one rank", "DP3", "TP2 x DP2", "PP2 x DP2, VPP2"],
)
def test_data_parallel_ranks_share_the_rows_of_a_batch_and_all_have_all_answers(
    topology: Topology,
    ranks: Ranks,
    decoder_folder: Callable[[str], Path],
    scalar_folder: Callable[[str], Path],
) -> None:
    found = ranks.run(
        f"{CHECKS}:rows_of_a_batch",
        world_size=topology.world_size,
        folder=str(decoder_folder("qwen2")),
        scalar_folder=str(scalar_folder("qwen2")),
        topology=topology,
    )
    for rank in found:
        assert max(rank.values()) < LARGEST_DIFFERENCE, rank


def test_a_folder_that_cannot_be_is_refused_before_anything_starts(
    decoder_folder: Callable[[str], Path],
) -> None:
    from rlhf_flows.models.megatron.scalar import check_megatron_scalar_folder

    topology = Topology(world_size=4, tensor_parallel=4)
    with pytest.raises(ConfigError, match="2 key-value heads by tensor_parallel 4"):
        check_megatron_scalar_folder(decoder_folder("qwen2, tied"), topology)
    shape = check_megatron_scalar_folder(decoder_folder("qwen2, tied"), Topology())
    assert shape.scalar_head
    assert not shape.tied
