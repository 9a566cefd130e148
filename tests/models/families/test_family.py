"""Families by their architectures, and how those of a program reach its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_flows import Family, register_family
from rlhf_flows.errors import ConfigError
from rlhf_flows.models import SFTTrainer, TorchPolicy
from rlhf_flows.models.causal_lm import check_model_folder
from rlhf_flows.models.families import family_of
from rlhf_flows.models.scalar_model import check_scalar_folder
from rlhf_flows.modules.hf_folder import HFFolder
from tests.models.families.tiny_families import GPT2_SIZES, SIZES, build

pytestmark = pytest.mark.usefixtures("forgotten")

STARCODER2 = Family(name="starcoder2", causal="Starcoder2ForCausalLM")


def starcoder2(folder: Path) -> Path:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    return build(folder, "Starcoder2ForCausalLM", sizes)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("GPT2ForSequenceClassification", "gpt2"),
        ("MixtralForCausalLM", "mixtral"),
        ("Qwen2ForSequenceClassification", "qwen2"),
    ],
)
def test_a_family_is_found_by_either_of_its_architectures(architecture: str, name: str) -> None:
    assert family_of(architecture).name == name


def test_an_unknown_architecture_is_answered_with_the_families_and_how_to_add_one(
    tmp_path: Path,
) -> None:
    folder = starcoder2(tmp_path)
    with pytest.raises(ConfigError) as found:
        check_model_folder(folder)
    for words in (
        f"the model in '{folder}' is a Starcoder2ForCausalLM",
        "gpt2 (GPT2LMHeadModel), llama (LlamaForCausalLM)",
        "rlhf_flows.register_family",
        "rlhf_flows.check_family",
    ):
        assert words in str(found.value)
    register_family(STARCODER2)
    assert check_model_folder(folder).path == folder


def test_a_near_miss_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nearest: 'Qwen2ForCausalLM'"):
        family_of("QWen2ForCausalLM")


def test_a_family_without_a_scalar_head_makes_no_value_model(tmp_path: Path) -> None:
    register_family(STARCODER2)
    with pytest.raises(ConfigError, match=r"'starcoder2'.*names no class with a scalar head"):
        check_scalar_folder(starcoder2(tmp_path))


def test_a_scalar_folder_is_no_language_model(tmp_path: Path) -> None:
    build(tmp_path, "LlamaForSequenceClassification", {**SIZES, "num_labels": 1})
    with pytest.raises(ConfigError, match=r"no language-model head.*LlamaForCausalLM"):
        check_model_folder(tmp_path)


def test_names_and_architectures_have_one_family() -> None:
    with pytest.raises(ConfigError, match="'llama' is one of rlhf_flows' own"):
        register_family(Family(name="llama", causal="MyLlamaForCausalLM"))
    with pytest.raises(ConfigError, match="LlamaForCausalLM belongs to the model family 'llama'"):
        register_family(Family(name="mine", causal="LlamaForCausalLM"))
    register_family(STARCODER2)
    mended = register_family(Family(**{**vars(STARCODER2), "shared_prefix": False}))
    assert family_of("Starcoder2ForCausalLM") is mended


def test_a_module_brings_the_families_of_its_program_to_another_process(tmp_path: Path) -> None:
    register_family(STARCODER2)
    folder = starcoder2(tmp_path)
    for module in (SFTTrainer(path=folder), TorchPolicy(path=folder)):
        (tmp_path / type(module).__name__).write_bytes(cloudpickle.dumps(module))
    program = (
        "import pathlib, sys, cloudpickle\n"
        "from rlhf_flows.models.families import registered_families\n"
        "assert not registered_families()\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for name in ('SFTTrainer', 'TorchPolicy'):\n"
        "    module = cloudpickle.loads((folder / name).read_bytes())\n"
        "    module.setup()\n"
        "    assert '_families' not in vars(module)\n"
        "    print(type(module.model).__name__, *registered_families())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == 2 * ["Starcoder2ForCausalLM", "starcoder2"]


def test_a_mended_family_makes_another_module(tmp_path: Path) -> None:
    module = SFTTrainer(path=tmp_path)
    prints = [module.fingerprint()]
    for shared_prefix in (True, False):
        register_family(Family(**{**vars(STARCODER2), "shared_prefix": shared_prefix}))
        prints.append(module.fingerprint())
    assert len(set(prints)) == 3


def test_the_published_files_of_gpt2_are_read_as_the_model_names_its_weights(
    tmp_path: Path,
) -> None:
    """They are of 2019: bare names, and the masks of attention among the weights."""
    build(tmp_path, "GPT2LMHeadModel", GPT2_SIZES)
    expected = HFFolder(tmp_path).weight_shapes
    file = tmp_path / "model.safetensors"
    bare = {n.removeprefix("transformer."): w for n, w in load_file(file).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    save_file({**bare, **masks}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("tie_word_embeddings", "dtype"):  # nor do they say this
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = HFFolder(tmp_path)
    assert folder.weight_shapes == expected
    assert (folder.max_positions, folder.head_width) == (64, 32)
    assert folder.cache_bytes_per_token("float32") == 2 * 2 * 2 * 32 * 4
    trainer = SFTTrainer(path=tmp_path)
    trainer.setup()
    folder.check_weights(trainer.named_weights())
