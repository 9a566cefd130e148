"""A small BERT that tells kind reviews from unkind ones, with a tokenizer of its own.

    python -m examples.reviews.classifier

What stands for a sentiment model from a hub: another architecture, other tokens than the policy's.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertTokenizerFast

from examples.reviews import text

__all__ = ["build"]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build(folder: str | Path, *, steps: int = 150, seed: int = 0) -> Path:
    """Trains it on reviews and writes the folder; its labels are "negative" and "positive"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for line in text.words() for word in line.split()})
    (folder / "vocab.txt").write_text("\n".join((*_SPECIAL, *words)), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, id2label={0: "negative", 1: "positive"},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config)
        _train(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(model: torch.nn.Module, tokenizer: BertTokenizerFast, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = text.demonstrations(64 * steps, seed=2)
    for step in range(steps):
        answers = [row["answer"] for row in rows[64 * step : 64 * (step + 1)]]
        labels = torch.tensor([int(text.read(answer)[0] > 0) for answer in answers])
        batch = tokenizer(answers, return_tensors="pt", padding=True)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    print(f"the classifier is in {build('reviews/classifier')}")
