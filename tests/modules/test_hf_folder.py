from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_flows.errors import ConfigError, SyncError
from rlhf_flows.modules.hf_folder import HFFolder

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "eos_token_id": 5,
    "hidden_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 10,
}
WEIGHTS = {"embed.weight": torch.zeros(10, 64), "layer.weight": torch.zeros(64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    derived = {"lm_head.weight": torch.zeros(10, 64), "a.rotary_emb.inv_freq": torch.zeros(8)}
    save_file({**WEIGHTS, **derived}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder_says_what_an_engine_must_know(folder: Path) -> None:
    found = HFFolder(folder)
    assert found.dtype == "bfloat16"
    assert found.max_positions == 128
    assert found.vocabulary_size == 10
    assert found.end_token_ids == {5, 7}
    assert found.head_width == 16
    # keys and values of 3 layers, 2 heads of 16 numbers each, 2 bytes a number
    assert found.cache_bytes_per_token("bfloat16") == 2 * 3 * 2 * 16 * 2


def test_weights_are_those_of_the_files_without_derived_ones(folder: Path) -> None:
    expected = {name: tuple(w.shape) for name, w in WEIGHTS.items()}
    assert dict(HFFolder(folder).weight_shapes) == expected


def test_all_weights_pass_with_or_without_a_tied_head(folder: Path) -> None:
    found = HFFolder(folder)
    found.check_weights(WEIGHTS.items())
    found.check_weights([*WEIGHTS.items(), ("lm_head.weight", torch.zeros(10, 64))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer.weight"), r"1 missing \(first 'layer\.weight'\)"),
        (lambda w: w.update(other=torch.zeros(1)), r"1 unknown \(first 'other'\)"),
        (
            lambda w: w.update({"layer.weight": torch.zeros(64, 32)}),
            r"1 of another shape \(first 'layer\.weight': \(64, 32\), \(64, 64\)\)",
        ),
    ],
)
def test_other_weights_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    weights = dict(WEIGHTS)
    change(weights)
    with pytest.raises(SyncError, match=message):
        HFFolder(folder).check_weights(weights.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "is not JSON"), ("[1]", "holds a list")],
)
def test_a_folder_without_a_configuration_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        HFFolder(tmp_path)


def test_no_folder_is_refused_with_its_path() -> None:
    with pytest.raises(ConfigError, match="no model folder at '/not/there'"):
        HFFolder("/not/there")
