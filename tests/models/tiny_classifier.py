"""A small BERT that tells good words from bad ones, and its WordPiece tokenizer; built locally."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

__all__ = ["BAD", "GOOD", "build_sentiment_bert", "word_piece_tokenizer"]

GOOD = ("good", "great", "lovely", "splendid")
BAD = ("bad", "awful", "dull", "sad")
_OTHER = ("the", "film", "was", "is", "a", "very", "story", "##s", "##ly", "!", ".", "?")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def word_piece_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *GOOD, *BAD, *_OTHER))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def build_sentiment_bert(folder: Path, *, max_length: int = 32, steps: int = 60) -> Path:
    """Trains for a second, until good words beat bad ones; writes a Hugging Face folder."""
    tokenizer = word_piece_tokenizer(max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_length,
        initializer_range=0.2,
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        chance = random.Random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            labels = [chance.choice([0, 1, 2]) for _ in range(32)]
            words = [{0: BAD, 1: ("film",), 2: GOOD}[label] for label in labels]
            texts = [
                " ".join(["the film was", *chance.choices(w, k=chance.randint(1, 4)), "."])
                for w in words
            ]
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            loss = model(**inputs, labels=torch.tensor(labels)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
