"""What VLLMModule says without an engine; what it does with one is in tests/models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_flows.errors import ConfigError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.modules.vllm_module import VLLMModule


def test_a_module_without_an_engine_says_what_to_call() -> None:
    module = VLLMModule("mine")
    with pytest.raises(ConfigError, match=r"'mine' has no engine: call self\.setup_engine"):
        module.generate([[1]], seeds=[0], settings=GenerationSettings())
    with pytest.raises(ConfigError, match="no engine"):
        module.load_weights([("w", torch.zeros(1))])
    assert module.vocabulary_size() == 0


def test_calls_of_it_are_rollout() -> None:
    assert VLLMModule.generates


def test_looking_for_vllm_does_not_import_it() -> None:
    code = (
        "import sys; from rlhf_flows.modules.vllm_module import VLLMModule;"
        " print(VLLMModule.available(), 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    installed = importlib.util.find_spec("vllm") is not None
    assert done.stdout.split() == [str(installed), "False"]


def test_without_vllm_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMModule, "available", staticmethod(lambda: False))
    with pytest.raises(ConfigError, match=r"rlhf-flows\[cpu\].*TorchPolicy"):
        VLLMModule("mine").setup_engine(".")


def test_heads_that_vllm_cannot_compute_on_cpu_are_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLMModule, "available", staticmethod(lambda: True))
    config = {"hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"16 wide.*takes 32, 64.*TorchPolicy"):
        VLLMModule("mine").setup_engine(tmp_path)
