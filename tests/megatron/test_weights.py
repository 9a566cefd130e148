"""Hugging Face weights in and out of Megatron, at every cut; and the logits they make there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.ranks import Ranks
from tests.megatron.tiny_decoders import VARIANTS

LARGEST_DIFFERENCE = 1e-5
CUTS = [
    Topology(world_size=4),
    Topology(world_size=4, tensor_parallel=2),
    Topology(world_size=4, pipeline_parallel=2),
    Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
    Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers_and_weights_come_out_bit_for_bit(
    variant: str, ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    found = ranks.run(
        "tests.megatron.checks:logits_and_weights",
        world_size=4,
        folder=str(decoder_folder(variant)),
        topologies=CUTS,
    )
    for i, topology in enumerate(CUTS):
        differences = [f[i]["logits"] for f in found if f[i]["logits"] is not None]
        assert len(differences) == 4 // topology.pipeline_parallel
        assert max(differences) < LARGEST_DIFFERENCE, topology
        assert all(f[i]["wrong"] == [] for f in found), topology
        assert all(f[i]["order"] == found[0][0]["order"] for f in found), topology


def test_the_comparison_sees_a_wrong_packing_of_queries_keys_and_values(
    ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    (difference,) = ranks.run(
        "tests.megatron.checks:logits_with_plain_packing", folder=str(decoder_folder("llama"))
    )
    assert difference > 1000 * LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 6, "has no weight 'model.layers.4."),
        ("intermediate_size", 96, "make [160, 48] for decoder.layers.0.mlp.linear_fc1.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    field: str,
    value: int,
    message: str,
    ranks: Ranks,
    decoder_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(decoder_folder("llama"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    (refusal,) = ranks.run("tests.megatron.checks:refused_weights", folder=str(folder))
    assert message in refusal


@pytest.mark.parametrize("variant", ["qwen2, tied", "llama"])
def test_what_ranks_export_is_a_folder_that_transformers_loads(
    variant: str, ranks: Ranks, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ranks.run(
        "tests.megatron.checks:exported_folder",
        world_size=4,
        folder=str(decoder_folder(variant)),
        topology=Topology(world_size=4, tensor_parallel=2, pipeline_parallel=2),
        to=str(tmp_path),
        max_file_bytes=40_000,
    )
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(decoder_folder(variant), dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
