from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_flows.models.tiny import build_tiny_qwen2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with a tokenizer of bytes. Read it, never write into it."""
    folder = tmp_path_factory.mktemp("tiny")
    return build_tiny_qwen2(folder, hidden_size=64, num_layers=2)
