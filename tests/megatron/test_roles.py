"""The ready-made trainers on Megatron, driven as workers drive them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.modules.hf_folder import HFFolder
from tests.megatron.agreement import SCALAR, Plain, agrees
from tests.megatron.ranks import Ranks

CHECKS = "tests.megatron.role_checks"
SHARED: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_parallel": 2}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "DP2": (2, {"distributed_optimizer": True}),
    "TP2 x DP2": (4, {"tensor_parallel": 2, "data_parallel": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("algorithm", ["sft", "grpo", "dpo", "ppo", *SCALAR])
@pytest.mark.parametrize("name", SHARED)
def test_a_role_trains_on_whole_batches_as_it_does_on_torch(
    name: str,
    algorithm: str,
    ranks: Ranks,
    plain: Plain,
    decoder_folder: Callable[[str], Path],
    scalar_folder: Callable[[str], Path],
) -> None:
    world_size, backend = SHARED[name]
    log, file = plain("qwen2, tied", algorithm)
    folder = (scalar_folder if algorithm in SCALAR else decoder_folder)("qwen2, tied")
    found = ranks.run(
        f"{CHECKS}:role_training",
        world_size=world_size,
        algorithm=algorithm,
        folder=str(folder),
        weights_file=file,
        backend=backend,
    )
    agrees(found, log)
    copies = world_size // backend.get("tensor_parallel", 1) // backend.get("pipeline_parallel", 1)
    assert {rank["place"] for rank in found} == {(i, copies) for i in range(copies)}


@pytest.mark.parametrize("name", ["one rank", "PP2", "TP2 x DP2"])
@pytest.mark.parametrize("variant", ["llama, biases, tied", "qwen3"])
def test_weights_are_taken_whole_or_not_at_all(
    name: str, variant: str, ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    world_size, backend = SHARED[name]
    found = ranks.run(
        f"{CHECKS}:weights_given_back",
        world_size=world_size,
        algorithm="sft",
        folder=str(decoder_folder(variant)),
        backend=backend,
    )
    for rank in found:
        assert rank["moved"]
        assert rank["untouched"]
        assert rank["back"]
        missing, unknown, shape, dtype = rank["messages"]
        assert "is missing" in missing
        assert "another is not in the model" in unknown
        assert "expected float32 [" in shape
        assert "is float64" in dtype
        for message in rank["messages"]:
            assert "Nothing was changed" in message


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2"])
def test_a_role_answers_probes_as_transformers_does(
    name: str, ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    world_size, backend = SHARED[name]
    folder = decoder_folder("qwen2, tied")
    sequences = [[5, 17, 3, 200], [9, 8, 7, 6, 5, 4, 3]]
    found = ranks.run(
        f"{CHECKS}:probed",
        world_size=world_size,
        folder=str(folder),
        sequences=sequences,
        backend=backend,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for logprobs, size in found:
        assert size == HFFolder(folder).vocabulary_size
        for sequence, row in zip(sequences, logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([sequence])).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0]
            assert row == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["one rank", "PP2"])
def test_the_statistics_of_a_value_travel_with_its_weights(
    name: str, ranks: Ranks, decoder_folder: Callable[[str], Path]
) -> None:
    world_size, backend = SHARED[name]
    found = ranks.run(
        f"{CHECKS}:statistics_given_back",
        world_size=world_size,
        folder=str(decoder_folder("qwen2, tied")),
        backend=backend,
    )
    for rank in found:
        assert {"value_norm.mean", "value_norm.std"} <= set(rank["names"])
        assert rank["moved"]
        assert rank["back"]
        assert rank["trained"]


def test_a_module_of_ones_own_goes_on_where_it_was_saved(
    ranks: Ranks, decoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = decoder_folder("llama")
    found = ranks.run(f"{CHECKS}:own_module", world_size=2, folder=str(folder), out=str(tmp_path))
    for rank in found:
        first, second, again = rank["losses"]
        assert second == again != first
        assert rank["same"]
        assert rank["place"] == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").config.hidden_size == 48
