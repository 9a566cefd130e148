"""Prompts that the comparison runs on, the same each time: sums, with none to four solved ones in
front of them, so that their lengths differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import SEED

__all__ = ["NUM_PROMPTS", "build_prompts"]

NUM_PROMPTS = 512


def build_prompts(root: Path) -> Path:
    """The JSONL file of prompts, made if it is not there."""
    path = root / "prompts.jsonl"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in _prompts()), encoding="utf-8")
    return path


def _prompts() -> Iterator[dict[str, str]]:
    draws = random.Random(SEED)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    draws.shuffle(pairs)
    shots, asked = pairs[:3000], pairs[3000:]
    rows = []
    for i, (a, b) in enumerate(asked[:NUM_PROMPTS]):
        solved = "".join(f"{x}+{y}={x + y}\n" for x, y in draws.sample(shots, i % 5))
        rows.append({"prompt": f"{solved}{a}+{b}="})
    draws.shuffle(rows)
    return iter(rows)
