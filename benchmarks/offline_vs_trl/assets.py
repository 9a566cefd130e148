"""The rows that the comparison runs on, the same each time: lists of solved sums.

A completion has six sums, about 60 tokens; the worse one of a pair has two to six, each with a
wrong digit. So completions of pairs differ in length, as they do in life.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import SEED
from benchmarks.offline_vs_trl.work import What

__all__ = ["NUM_ROWS", "build_rows"]

NUM_ROWS = 2048
_PROMPT = "sums:\n"


def build_rows(what: What, root: Path) -> Path:
    """The JSONL file of rows, made if it is not there."""
    path = root / ("demonstrations.jsonl" if what == "sft" else "pairs.jsonl")
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in _rows(what))
        path.write_text(text, encoding="utf-8")
    return path


def _rows(what: What) -> Iterator[dict[str, str]]:
    draws = random.Random(SEED)
    for _ in range(NUM_ROWS):
        sums = [(draws.randrange(100), draws.randrange(100)) for _ in range(6)]
        good = "".join(f"{a}+{b}={a + b}\n" for a, b in sums)
        wrong = sums[: draws.randrange(2, 7)]
        bad = "".join(f"{a}+{b}={_near_miss(draws, str(a + b))}\n" for a, b in wrong)
        if what == "sft":
            yield {"prompt": _PROMPT, "completion": good}
        else:
            yield {"prompt": _PROMPT, "chosen": good, "rejected": bad}


def _near_miss(draws: random.Random, answer: str) -> str:
    place = draws.randrange(len(answer))
    digit = draws.choice([c for c in "0123456789" if c != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]
