"""The quickstart's task: write five digits in order. `70213>` is answered by `01237`.

Pure Python. Warm-up demonstrations are wrong more often than right (40 % sorted, 30 % sorted the
wrong way round, 30 % copied as they were), so a model taught by them knows the form of an answer
and three ideas of its content; reinforcement has to find out which of them pays. The reward is
half for the share of digits in the right place, half for the whole answer.

All 100 000 prompts are dealt out once, by a shuffle with a fixed seed: the first `HELD_OUT` are
for evaluation only, so no demonstration and no training prompt is among them.
"""

from __future__ import annotations

import random
from functools import cache

__all__ = [
    "CHARACTERS",
    "HELD_OUT",
    "MAX_NEW_TOKENS",
    "NUM_DIGITS",
    "demonstrations",
    "held_out_prompts",
    "reward",
    "training_prompts",
]

NUM_DIGITS = 5
CHARACTERS = "0123456789>"
"""All that a prompt or an answer is made of: the vocabulary of the quickstart's model."""
MAX_NEW_TOKENS = NUM_DIGITS + 1
"""An answer and its end token."""
HELD_OUT = 2048
"""Prompts kept for evaluation."""

SORTED, REVERSED = 0.4, 0.3
"""Shares of the demonstrations; the rest is copied."""


@cache
def _dealt() -> tuple[str, ...]:
    digits = [f"{i:0{NUM_DIGITS}d}" for i in range(10**NUM_DIGITS)]
    random.Random("sort_digits").shuffle(digits)
    return tuple(digits)


def _row(digits: str) -> dict[str, str]:
    return {"prompt": f"{digits}>", "answer": "".join(sorted(digits))}


def held_out_prompts(num_prompts: int = 512) -> list[dict[str, str]]:
    """Rows for evaluation: the same ones each time, never trained on."""
    if not 1 <= num_prompts <= HELD_OUT:
        raise ValueError(f"asked for {num_prompts} held-out prompts, there are 1 to {HELD_OUT}")
    return [_row(d) for d in _dealt()[:num_prompts]]


def training_prompts(num_prompts: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows to train on, drawn without repetition from all that are not held out."""
    return [_row(d) for d in random.Random(f"prompts {seed}").sample(_pool(), num_prompts)]


def demonstrations(num_rows: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the warm-up: a prompt and a completion, more often wrong than right."""
    rng = random.Random(f"demonstrations {seed}")
    rows = []
    for digits in rng.choices(_pool(), k=num_rows):
        answer, kind = "".join(sorted(digits)), rng.random()
        wrong = answer[::-1] if kind < SORTED + REVERSED else digits
        rows.append({"prompt": f"{digits}>", "completion": answer if kind < SORTED else wrong})
    return rows


def _pool() -> tuple[str, ...]:
    return _dealt()[HELD_OUT:]


def reward(prompt: str, completion: str, answer: str) -> dict[str, float]:
    """Half for the share of digits in the right place, half for the whole answer; and `exact`."""
    in_place = sum(a == b for a, b in zip(completion, answer, strict=False)) / len(answer)
    exact = float(completion == answer)
    return {"reward": 0.5 * in_place + 0.5 * exact, "exact": exact}
