"""The example of a registered family: its workers know it, though they never import it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.custom_family import train
from rlhf_flows.exports import exported_model


@pytest.mark.slow  # workers that load torch and transformers
@pytest.mark.usefixtures("services")
def test_a_registered_family_is_trained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FLOWS_CACHE", str(tmp_path / "cache"))
    done = train("olmo2", str(tmp_path))
    losses = [episode["loss"] for episode in done.episodes.values()]
    assert losses[-1] < 0.7 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(exported_model(str(tmp_path), "olmo2"))
    assert type(model).__name__ == "Olmo2ForCausalLM"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "cache" / "custom-family-model")
    trained, before = model.state_dict(), base.state_dict()
    assert all(not torch.equal(trained[name], before[name]) for name in before)
