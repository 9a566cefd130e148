"""Weights written as they come are a folder that `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.modules.hf_export import copy_description, write_weights
from rlhf_flows.modules.hf_folder import HFFolder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen2(tmp_path_factory.mktemp("model"), hidden_size=32, num_layers=2)


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000, 1], ids=["one", "several", "each"])
def test_exports_load_as_what_they_were_made_of(
    max_file_bytes: int, model: Path, tmp_path: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    weights = {n: w for n, w in before.state_dict().items() if n in HFFolder(model).weight_shapes}
    copy_description(model, tmp_path, dtype="bfloat16")
    write_weights(iter(weights.items()), tmp_path, max_file_bytes=max_file_bytes)

    after = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert after.dtype == torch.bfloat16
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    text = "12 + 3"
    ours, theirs = (AutoTokenizer.from_pretrained(f)(text)["input_ids"] for f in (tmp_path, model))
    assert ours == theirs
    HFFolder(tmp_path).check_weights(weights.items())

    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 1: len(weights)}.get(max_file_bytes, len(files))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held = [opened.get_tensor(n) for n in opened.keys()]  # noqa: SIM118
        assert len(held) == 1 or sum(t.nbytes for t in held) <= max_file_bytes
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        said = json.loads(index.read_text())
        assert said["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
        assert {tmp_path / name for name in said["weight_map"].values()} == set(files)


def test_a_tensor_may_be_used_again_once_the_next_one_came(tmp_path: Path) -> None:
    buffer = torch.zeros(4)

    def weights():  # type: ignore[no-untyped-def]
        for i in range(3):
            yield f"w{i}", buffer.fill_(float(i))

    write_weights(weights(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert [float(file.get_tensor(f"w{i}")[0]) for i in range(3)] == [0.0, 1.0, 2.0]
