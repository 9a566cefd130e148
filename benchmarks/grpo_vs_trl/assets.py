"""Builds what the comparison runs on, offline and the same each time: two models and prompts.

`tiny` (1.05 M parameters) and `small` (25.7 M) are Qwen2-shaped, of random weights, with a
byte-pair tokenizer trained on the source of Python's standard library. Prompts are sums with none
to four solved ones in front of them, so that their lengths differ.
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

__all__ = ["MODELS", "NUM_PROMPTS", "build_model", "build_prompts"]

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
NUM_PROMPTS = 512
_SEED = 1234
_SPECIAL = ("<|pad|>", "<|end|>", "<|unk|>")
_CORPUS_CHARACTERS = 4_000_000
_UNTYPED: Any = transformers
"""Its models and tokenizers have no annotations."""


def build_model(name: str, root: Path) -> Path:
    """The folder of model and tokenizer, made if it is not there."""
    folder = root / name
    if (folder / "model.safetensors").exists():
        return folder
    spec = MODELS[name]
    tokenizer = _tokenizer(spec["vocab_size"])
    config = _UNTYPED.Qwen2Config(
        **spec,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(_SEED)
    model = _UNTYPED.Qwen2ForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def build_prompts(root: Path) -> Path:
    """The JSONL file of prompts, made if it is not there."""
    path = root / "prompts.jsonl"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in _prompts()), encoding="utf-8")
    return path


def _prompts() -> Iterator[dict[str, str]]:
    draws = random.Random(_SEED)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    draws.shuffle(pairs)
    shots, asked = pairs[:3000], pairs[3000:]
    rows = []
    for i, (a, b) in enumerate(asked[:NUM_PROMPTS]):
        solved = "".join(f"{x}+{y}={x + y}\n" for x, y in draws.sample(shots, i % 5))
        rows.append({"prompt": f"{solved}{a}+{b}="})
    draws.shuffle(rows)
    return iter(rows)


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
