from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.megatron.causal_lm import check_megatron_folder
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.ranks import Ranks
from tests.megatron.test_conversion import SHAPE
from tests.megatron.tiny_decoders import SIZES
from tests.models.families.tiny_families import build


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0, expected at least 1"),
        ({"world_size": 6, "tensor_parallel": 2, "pipeline_parallel": 2}, "multiple of 4 ranks"),
        ({"virtual_pipeline": 2}, "pipeline_parallel is 1"),
        ({"sequence_parallel": True}, "tensor_parallel is 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(**numbers)


def test_what_does_not_divide_is_named_all_at_once() -> None:
    topology = Topology(world_size=12, tensor_parallel=4, pipeline_parallel=3)
    with pytest.raises(ConfigError) as refusal:
        topology.check(SHAPE)
    for part in ("6 attention heads", "2 key-value heads", "10 MLP columns", "2 layers"):
        assert part in str(refusal.value)
    Topology(world_size=2, tensor_parallel=2).check(SHAPE)


def test_stages_with_several_runs_need_that_many_more_layers() -> None:
    topology = Topology(world_size=2, pipeline_parallel=2)
    topology.check(SHAPE)
    with pytest.raises(ConfigError, match="2 layers by pipeline_parallel 2 x virtual_pipeline 2"):
        replace(topology, virtual_pipeline=2).check(SHAPE)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 64, 259, 151_936])
def test_the_padded_vocabulary_holds_all_tokens_alike_on_all_ranks(
    tensor_parallel: int, size: int
) -> None:
    padded = Topology(
        world_size=tensor_parallel, tensor_parallel=tensor_parallel
    ).padded_vocabulary(size)
    assert size <= padded < size + 64 * tensor_parallel
    assert padded % (64 * tensor_parallel) == 0


def test_neighbours_share_layers_and_far_ranks_are_other_stages(ranks: Ranks) -> None:
    found = ranks.run(
        "tests.megatron.checks:groups_of_topology",
        world_size=4,
        topology=Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
    )
    assert found[0] == {"tensor": [0, 1], "pipeline": [0, 2], "data": [0]}
    assert found[3] == {"tensor": [2, 3], "pipeline": [1, 3], "data": [3]}


def test_more_ranks_than_the_topology_has_are_refused(ranks: Ranks) -> None:
    found = ranks.run(
        "tests.megatron.checks:refused_topology", world_size=2, topology=Topology(world_size=4)
    )
    assert all("of 4 ranks, and 2 joined" in message for message in found)


@pytest.mark.parametrize(
    ("architecture", "peculiar", "message"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias=True beside mlp_bias=False"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias=True"),
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act='relu'"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
        ("MixtralForCausalLM", {"num_local_experts": 4}, "'mixtral', which Megatron does not"),
    ],
)
def test_what_megatron_would_not_compute_is_refused_by_name(
    architecture: str, peculiar: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build(tmp_path, architecture, {**SIZES, **peculiar})
    with pytest.raises(ConfigError, match=message):
        check_megatron_folder(tmp_path, Topology())


def test_a_folder_is_read_for_its_shape_and_checked_against_a_topology(
    decoder_folder: Callable[[str], Path],
) -> None:
    shape = check_megatron_folder(
        decoder_folder("gemma"), Topology(world_size=2, tensor_parallel=2)
    )
    assert (shape.activation, shape.zero_centered_norms, shape.tied) == ("gelu_tanh", True, True)
    assert shape.embedding_scale == SIZES["hidden_size"] ** 0.5
    with pytest.raises(ConfigError, match="key-value heads by tensor_parallel 4"):
        check_megatron_folder(decoder_folder("gemma"), Topology(world_size=4, tensor_parallel=4))


def test_groups_that_another_rank_does_not_make_end_within_the_timeout(ranks: Ranks) -> None:
    begun = time.monotonic()
    message, _ = ranks.run("tests.megatron.checks:groups_that_one_rank_does_not_make", world_size=2)
    assert "rank 0 could not make the groups" in message
    assert "within 2 s" in message
    assert time.monotonic() - begun < 40
