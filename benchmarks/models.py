"""The models that comparisons run on, built offline and the same each time.

`tiny` (1.05 M parameters) and `small` (25.7 M) are Qwen2-shaped, of random weights, with a
byte-pair tokenizer trained on the source of Python's standard library.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

__all__ = ["MODELS", "SEED", "build_model", "build_reward_model"]

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
SEED = 1234
_SPECIAL = ("<|pad|>", "<|end|>", "<|unk|>")
_CORPUS_CHARACTERS = 4_000_000
_UNTYPED: Any = transformers
"""Its models and tokenizers have no annotations."""


def build_model(name: str, root: Path) -> Path:
    """The folder of model and tokenizer, made if it is not there."""
    return _build(name, root / name, "Qwen2ForCausalLM")


def build_reward_model(name: str, root: Path) -> Path:
    """The same with a head of one label in place of the vocabulary's: a reward model to be."""
    return _build(name, root / f"{name}-reward", "Qwen2ForSequenceClassification", num_labels=1)


def _build(name: str, folder: Path, architecture: str, **more: Any) -> Path:
    if (folder / "model.safetensors").exists():
        return folder
    spec = MODELS[name]
    tokenizer = _tokenizer(spec["vocab_size"])
    config = _UNTYPED.Qwen2Config(
        **spec,
        **more,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = getattr(_UNTYPED, architecture)(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int) -> Any:
    """Qwen2's kind, because loaders pick the class by the type of the model."""
    splits = _UNTYPED.Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splits.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    found = json.loads(trained.to_str())["model"]
    pad, end, unknown = _SPECIAL
    return _UNTYPED.Qwen2Tokenizer(
        vocab=found["vocab"],
        merges=[tuple(m) for m in found["merges"]],
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def _corpus() -> Iterator[str]:
    """The interpreter's own library, and sums."""
    seen = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        seen += len(text)
        yield text
        if seen > _CORPUS_CHARACTERS:
            break
    draws = random.Random(1)
    for _ in range(2000):
        a, b = draws.randrange(100), draws.randrange(100)
        yield f"{a}+{b}={a + b}\n"
