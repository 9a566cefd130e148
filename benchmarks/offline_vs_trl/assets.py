"""The rows that the comparison runs on, the same each time: lists of solved sums.

Even rows have a prompt of a few tokens and a completion of six sums, about 60 tokens; the worse one
of a pair has two to six, each with a wrong digit. Uneven rows are what preferences and
demonstrations are like outside of benchmarks: prompts as long as completions, one to 24 sums in
each, the worse completion again shorter than the better one or as long.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import SEED
from benchmarks.offline_vs_trl.work import Lengths, What

__all__ = ["NUM_ROWS", "build_rows"]

NUM_ROWS = 2048
_PROMPT = "sums:\n"


def build_rows(what: What, lengths: Lengths, root: Path) -> Path:
    """The JSONL file of rows, made if it is not there."""
    path = root / f"{lengths}-{'demonstrations' if what == 'sft' else 'pairs'}.jsonl"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in _rows(what, lengths))
        path.write_text(text, encoding="utf-8")
    return path


def _rows(what: What, lengths: Lengths) -> Iterator[dict[str, str]]:
    draws = random.Random(SEED)
    for _ in range(NUM_ROWS):
        shots, asked = (0, 6) if lengths == "even" else (draws.randint(1, 24), draws.randint(1, 24))
        prompt = _PROMPT + "".join(f"{a}+{b}={a + b}\n" for a, b in _sums(draws, shots))
        sums = _sums(draws, asked)
        good = "".join(f"{a}+{b}={a + b}\n" for a, b in sums)
        wrong = sums[: draws.randint(min(2, asked), asked)]
        bad = "".join(f"{a}+{b}={_near_miss(draws, str(a + b))}\n" for a, b in wrong)
        if what == "sft":
            yield {"prompt": prompt, "completion": good}
        else:
            yield {"prompt": prompt, "chosen": good, "rejected": bad}


def _sums(draws: random.Random, count: int) -> list[tuple[int, int]]:
    return [(draws.randrange(100), draws.randrange(100)) for _ in range(count)]


def _near_miss(draws: random.Random, answer: str) -> str:
    place = draws.randrange(len(answer))
    digit = draws.choice([c for c in "0123456789" if c != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]
