"""Rewards of a real BERT with a tokenizer of its own, against a plain loop of transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_flows.data.batch import Batch
from rlhf_flows.errors import ConfigError, DataError, RewardError
from rlhf_flows.models.classifier_reward import ClassifierReward
from rlhf_flows.models.tiny import build_tiny_qwen2
from tests.models.tiny_classifier import build_sentiment_bert, word_piece_tokenizer

LIMIT = 32
COMPLETIONS = [
    "was good, very lovely and splendid!",
    "was bad. The story is awful",
    "",
    "is a film",
    "was great " * 30,
    "Ünknown wörds",
    "bad " * 40,
]
BATCH: Batch = {
    "sample_id": [f"s{i}" for i in range(len(COMPLETIONS))],
    "prompt": ["The film ", "It ", "", "This ", "The film ", "A", "The story "],
    "completion": COMPLETIONS,
    "response_ids": [torch.arange(2) for _ in COMPLETIONS],  # of the policy: no affair of BERT's
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sentiment_bert(tmp_path_factory.mktemp("bert"), max_length=LIMIT)


def scored(path: Path, data: Batch = BATCH, **options: Any) -> Batch:
    made = ClassifierReward(path=path, **options)
    made.validate()
    made.setup()
    return made.forward_step(data)


def plain_logits(path: Path, texts: list[Any], label: int) -> list[float]:
    """One text at a time, as a user of transformers writes it."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for text in texts:
        # As lists of one: alone, an empty second text would count as none.
        parts = [[part] for part in (text if isinstance(text, tuple) else (text,))]
        inputs = tokenizer(*parts, truncation=True, max_length=LIMIT, return_tensors="pt")
        with torch.no_grad():
            found.append(float(model(**inputs).logits[0, label]))
    return found


@pytest.mark.parametrize("scored_text", ["whole", "completion", "pair"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 16384])
def test_rewards_are_the_logits_of_a_plain_loop(
    scored_text: Any, micro_batch_tokens: int, bert: Path
) -> None:
    pairs = list(zip(BATCH["prompt"], COMPLETIONS, strict=True))
    texts = {
        "whole": [prompt + completion for prompt, completion in pairs],
        "completion": COMPLETIONS,
        "pair": pairs,
    }[scored_text]
    out = scored(bert, scored_text=scored_text, micro_batch_tokens=micro_batch_tokens)
    assert list(out) == ["reward"]
    assert out["reward"].dtype == torch.float32
    assert not out["reward"].requires_grad
    expected = plain_logits(bert, texts, label=2)
    torch.testing.assert_close(out["reward"], torch.tensor(expected), rtol=0, atol=1e-6)


def test_good_words_are_worth_more_than_bad_ones(bert: Path) -> None:
    good, bad, *_ = scored(bert, label="positive")["reward"].tolist()
    assert good > bad + 1


@pytest.mark.parametrize(("label", "number"), [("negative", 0), (1, 1), ("positive", 2), (None, 2)])
def test_a_label_is_given_by_name_or_number(label: Any, number: int, bert: Path) -> None:
    out = scored(bert, label=label, scored_text="completion")
    expected = plain_logits(bert, COMPLETIONS, label=number)
    torch.testing.assert_close(out["reward"], torch.tensor(expected), rtol=0, atol=1e-6)


def test_no_text_is_longer_than_the_positions_of_the_model(tmp_path: Path) -> None:
    """RoBERTa's positions begin after the one of padding, and tokenizers may know no limit."""
    tokenizer = word_piece_tokenizer(10**30)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = {"completion": ["good " * n for n in (14, 15, 16, 300)]}
    rewards = scored(tmp_path, data, scored_text="completion")["reward"].tolist()
    assert rewards[1] == rewards[2] == rewards[3]  # 17 tokens: 15 words between two ends
    assert rewards[0] != rewards[1]


def test_an_empty_batch_has_an_empty_reward(bert: Path) -> None:
    assert scored(bert, {"prompt": [], "completion": []})["reward"].shape == (0,)


def test_a_logit_that_is_not_finite_is_a_failure(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4] = torch.nan  # "good"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    with pytest.raises(RewardError, match=r"returned nan as 'reward'.*sample s0"):
        scored(folder)
    out = scored(folder, on_failure="score", failure_reward=-9.0)
    assert out["reward_failed"].tolist() == [True] + 6 * [False]
    assert out["reward"][0] == -9.0


# ---- what is refused --------------------------------------------------------------------------


def changed(bert: Path, folder: Path, config: dict[str, Any], *, without: str = "-") -> Path:
    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns(without))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def test_a_folder_that_is_no_classifier_is_refused(bert: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            ClassifierReward(path=path, **options).validate()

    refused(tmp_path / "nowhere", "no model folder")
    refused(changed(bert, tmp_path / "a", {}, without="*.safetensors"), "has no weights")
    refused(changed(bert, tmp_path / "b", {}, without="tokenizer*"), "has no tokenizer")
    refused(build_tiny_qwen2(tmp_path / "c", hidden_size=32, num_layers=1), "a classifier of texts")
    refused(
        bert, r"no label 'positve' \(nearest: 'positive'\): it has 0: 'negative'", label="positve"
    )
    refused(bert, "no label 3", label=3)
    refused(bert, "no label -1", label=-1)
    refused(bert, "scored_text of module", scored_text="all")


def test_weights_that_would_be_drawn_at_random_are_refused(bert: Path, tmp_path: Path) -> None:
    bigger = changed(bert, tmp_path / "bigger", {"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"lack bert\.encoder\.layer\.2"):
        scored(bigger)


def test_a_batch_without_texts_is_named(bert: Path) -> None:
    with pytest.raises(DataError, match=r"needs the column 'prompt' to score.*\['completion'\]"):
        scored(bert, {"completion": ["a"]})


def test_another_file_in_the_folder_is_another_fingerprint(bert: Path, tmp_path: Path) -> None:
    folder = changed(bert, tmp_path / "x", {})
    before = ClassifierReward(path=folder).fingerprint()
    assert ClassifierReward(path=folder).fingerprint() == before
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert ClassifierReward(path=folder).fingerprint() != before
