from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_flows.errors import ConfigError
from rlhf_flows.models.tiny import build_tiny_qwen2, character_tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = contents(build_tiny_qwen2(tmp_path / "a", num_layers=1))
    torch.manual_seed(2)
    assert contents(build_tiny_qwen2(tmp_path / "b", num_layers=1)) == first
    assert contents(build_tiny_qwen2(tmp_path / "c", num_layers=1, seed=1)) != first


def test_building_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny_qwen2(tmp_path, num_layers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_has_about_a_million_parameters_and_heads_that_vllm_takes(
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_qwen2(tmp_path))
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert model.config.hidden_size // model.config.num_attention_heads == 32


@pytest.mark.parametrize("text", ["70213>", "Two words,\n\ttwo lines.", "naïve 漢字"])
def test_any_text_survives_the_tokenizer_that_loaders_find(tmp_path: Path, text: str) -> None:
    build_tiny_qwen2(tmp_path, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_characters_make_the_vocabulary() -> None:
    tokenizer = character_tokenizer("01>")
    assert len(tokenizer) == 6
    assert tokenizer("10>")["input_ids"] == [4, 3, 5]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize("characters", ["aba", "é"])
def test_characters_that_make_no_vocabulary_are_refused(characters: str) -> None:
    with pytest.raises(ConfigError, match="ASCII and all different"):
        character_tokenizer(characters)


def test_a_width_that_no_head_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        build_tiny_qwen2(tmp_path, hidden_size=48)
