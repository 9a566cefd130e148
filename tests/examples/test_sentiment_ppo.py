"""ReaL's example of a custom experiment in our terms: the program itself, on models made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers

from examples.reviews import text
from examples.reviews.classifier import build
from rlhf_flows.config_loading import load_config
from rlhf_flows.deployments import find_recipe
from rlhf_flows.models.tiny import build_tiny_qwen2, word_tokenizer

LINES_OF_REAL = 72
"""Code of the original: its interface, its configuration, and their registration."""


def test_the_program_is_at_most_half_as_long_as_the_original() -> None:
    program = Path("examples/sentiment_ppo.py").read_text("utf-8")
    code = program.split('"""')[-1].splitlines()
    assert sum(1 for line in code if line.strip()) <= LINES_OF_REAL / 2


@pytest.mark.slow
@pytest.mark.usefixtures("services")
def test_a_classifier_of_hugging_face_replaces_the_reward_model_of_ppo(tmp_path: Path) -> None:
    policy = build_tiny_qwen2(
        tmp_path / "policy", tokenizer=word_tokenizer(text.words()), hidden_size=64, num_layers=2
    )
    classifier = build(tmp_path / "classifier", steps=2)
    prompts = tmp_path / "prompts.jsonl"
    pd.DataFrame(text.prompts(64, seed=0)).to_json(prompts, orient="records", lines=True)

    recipe = find_recipe("examples.sentiment_ppo:my-ppo")
    words = [
        f"model={policy}", f"prompts={prompts}", f"reward.args.path={classifier}",
        f"store.url={tmp_path / 'runs'}", "run_name=sentiment", "sampler=transformers",
        "ppo.kl_coef=0.1", "generation.top_p=0.9", "generation.max_new_tokens=8",
        "runtime.num_episode=1", "runtime.sample_per_episode=16",
    ]  # fmt: skip
    config = load_config(recipe.config, words)
    assert (config.ppo.kl_coef, config.generation.top_p) == (0.1, 0.9)
    recipe.check(config)
    done = recipe.build(config).learn()
    assert done.version == 1

    def column(phase: str, name: str) -> list[Any]:
        frame = pd.read_parquet(tmp_path / "runs/sentiment/episodes/episode=000000" / phase)
        return list(frame.sort_values("sample_id")[name])

    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for completion, reward in zip(
        column("rollout", "completion"), column("scoring", "reward"), strict=True
    ):
        with torch.no_grad():
            logits = model(**tokenizer(completion, return_tensors="pt", truncation=True)).logits
        assert reward == pytest.approx(float(logits[0, -1]), abs=1e-5)
