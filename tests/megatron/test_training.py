"""The same stream of batches gives the same losses, norms and weights, whatever trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.agreement import CHECKS, TOPOLOGIES, Plain, agrees
from tests.megatron.ranks import Ranks


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_trains_as_plain_torch_does(
    name: str, ranks: Ranks, plain: Plain, decoder_folder: Callable[[str], Path]
) -> None:
    topology, options = TOPOLOGIES[name]
    log, file = plain("qwen2, tied")
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=topology.world_size,
        folder=str(decoder_folder("qwen2, tied")),
        topology=topology,
        sizes=[1, 3, 2, 1],
        weights_file=file,
        **options,
    )
    agrees(found, log)


@pytest.mark.parametrize("variant", ["llama, biases, tied", "qwen3", "gemma"])
def test_every_kind_of_layer_trains_as_plain_torch_does(
    variant: str, ranks: Ranks, plain: Plain, decoder_folder: Callable[[str], Path]
) -> None:
    log, file = plain(variant)
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=4,
        folder=str(decoder_folder(variant)),
        topology=Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
        sizes=[3, 4],
        weights_file=file,
    )
    agrees(found, log)


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize(
    "topology",
    [
        Topology(world_size=2),
        Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
    ],
    ids=["DP2", "TP2 x PP2, SP"],
)
def test_other_losses_train_as_on_plain_torch_and_report_the_same(
    algorithm: str,
    topology: Topology,
    ranks: Ranks,
    plain: Plain,
    decoder_folder: Callable[[str], Path],
) -> None:
    log, file = plain("qwen2, tied", algorithm)
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=topology.world_size,
        algorithm=algorithm,
        folder=str(decoder_folder("qwen2, tied")),
        topology=topology,
        sizes=[1, 3, 2, 1],
        weights_file=file,
    )
    agrees(found, log)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        (Topology(world_size=2), [7]),
        (Topology(world_size=4, pipeline_parallel=2), [7]),
        (Topology(world_size=2, pipeline_parallel=2, virtual_pipeline=2), [2, 4, 1]),
    ],
    ids=["DP2", "DP2 x PP2", "rounds of stages not full"],
)
def test_ranks_without_micro_batches_take_part(
    topology: Topology,
    sizes: list[int],
    ranks: Ranks,
    plain: Plain,
    decoder_folder: Callable[[str], Path],
) -> None:
    log, file = plain("qwen2, tied")
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=topology.world_size,
        folder=str(decoder_folder("qwen2, tied")),
        topology=topology,
        sizes=sizes,
        weights_file=file,
    )
    agrees(found, log)


@pytest.mark.parametrize("sizes", [[7], [1] * 7], ids=["all packed", "each alone"])
@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(world_size=2, tensor_parallel=2, sequence_parallel=True),
        Topology(world_size=2, pipeline_parallel=2, virtual_pipeline=2),
    ],
    ids=["one rank", "TP2, SP", "PP2, VPP2"],
)
def test_packed_logprobs_and_entropies_are_those_of_padded_rows(
    topology: Topology, sizes: list[int], ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    found = ranks.run(
        f"{CHECKS}:megatron_logprobs",
        world_size=topology.world_size,
        folder=str(decoder_folder("qwen2, windows in some layers")),
        topology=topology,
        sizes=sizes,
    )
    for rank in found:
        assert max(rank.values()) < 1e-5, rank


def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    found = ranks.run(
        f"{CHECKS}:step_that_is_not_finite",
        world_size=2,
        folder=str(decoder_folder("qwen2")),
        topology=Topology(world_size=2, tensor_parallel=2),
    )
    for rank in found:
        assert "weights were left" in rank["message"]
        assert rank["unchanged"]
        assert rank["num_steps"] == 0


def test_bfloat16_trains_as_float32_does_but_for_its_rounding(
    ranks: Ranks, plain: Plain, decoder_folder: Callable[[str], Path]
) -> None:
    log, file = plain("qwen3")
    found = ranks.run(
        f"{CHECKS}:megatron_training",
        world_size=2,
        folder=str(decoder_folder("qwen3")),
        topology=Topology(world_size=2, tensor_parallel=2, sequence_parallel=True),
        sizes=[3, 4],
        weights_file=file,
        distributed_optimizer=True,
        dtype="bfloat16",
    )
    for rank in found:
        for step, expected in zip(rank["log"], log, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=0.02)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
        assert rank["weights"] < 0.02


def test_bfloat16_weights_have_float32_ones_that_the_optimizer_steps(
    ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    (dtypes,) = ranks.run(
        f"{CHECKS}:dtypes_of_the_optimizer",
        folder=str(decoder_folder("qwen3")),
        topology=Topology(),
    )
    assert dtypes == {"torch.float32"}
