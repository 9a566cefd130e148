"""The files that the stages start from: a model of a million parameters that knows nothing, and
text for it to learn from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.reviews import text
from rlhf_flows.models.tiny import build_tiny_qwen2, word_tokenizer

__all__ = ["make"]


def make(folder: Path) -> Path:
    """Writes them, the same ones each time; does nothing where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        build_tiny_qwen2(
            folder / "model", tokenizer=word_tokenizer(text.words()), max_position_embeddings=128
        )
    for name, rows in {
        "demonstrations": text.demonstrations(8192, seed=0),
        "preferences": text.preferences(8192, seed=0),
        "held_out_preferences": text.preferences(128, seed=1, held_out=True),
        "prompts": text.prompts(4096, seed=0),
        "held_out_prompts": text.prompts(256, seed=1, held_out=True),
    }.items():
        _write(folder / f"{name}.jsonl", rows)
    return folder


def _write(file: Path, rows: Sequence[Any]) -> None:
    if not file.is_file():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(lines, encoding="utf-8")
