"""Short film reviews, written by a grammar: text to learn from that nobody has to download.

A review is two or three clauses, each of which praises or blames one thing: `the plot was very
clever and the music was dull .` What a reader thinks of it can be counted: the share of praise less
that of blame, and nothing at all for what is no review.

    demonstrations   reviews as they come, half of the clauses praise (supervised fine-tuning)
    preferences      of two reviews of one film the kinder, and the better written (reward, DPO)
    prompts          films (PPO, GRPO, online DPO)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

__all__ = ["demonstrations", "preferences", "prompts", "read", "reward", "words"]

KINDS = ("comedy", "drama", "thriller", "western", "musical", "mystery", "romance", "satire")
TOPICS = (
    "a lighthouse", "two brothers", "the sea", "a lost dog", "the last train", "a small town",
    "an old piano", "three thieves", "a long winter", "the neighbours", "a letter", "the circus",
)  # fmt: skip
YEARS = tuple(range(1950, 2010))
THINGS = ("plot", "acting", "music", "ending", "dialogue", "pace", "cast", "camera")
DEGREES = ("", "very ", "truly ", "rather ", "almost always ")
PRAISE = ("superb", "warm", "clever", "moving", "brilliant", "graceful", "honest", "witty")
BLAME = ("dull", "clumsy", "tired", "shallow", "dreadful", "noisy", "hollow", "lazy")
JOINTS = (" and ", " , ", " but ")
HELD_OUT_YEARS = YEARS[::6]
"""Films of these years are for evaluation only."""

_CLAUSE = (
    rf"the (?:{'|'.join(THINGS)}) was (?:{'|'.join(d for d in DEGREES if d)})?"
    rf"(?:{'|'.join(PRAISE + BLAME)})"
)
_REVIEW = re.compile(rf"\s*{_CLAUSE}(?:(?:{'|'.join(JOINTS)}){_CLAUSE}){{1,2}} \.")
MAX_NEW_TOKENS = 24
"""A review and its end token."""


def read(text: str) -> tuple[float, bool]:
    """What a reader thinks of a review, in [-1, 1], and whether it is one; -1 where it is none."""
    if _REVIEW.fullmatch(text) is None:
        return -1.0, False
    found = text.split()
    praise, blame = (sum(word in kind for word in found) for kind in (PRAISE, BLAME))
    return (praise - blame) / (praise + blame), True


def reward(completion: str) -> dict[str, float]:
    """The reader as a reward function, which learnt ones are compared with."""
    opinion, is_review = read(completion)
    return {"reward": opinion, "is_review": float(is_review)}


def prompts(num_rows: int, *, seed: int, held_out: bool = False) -> list[dict[str, str]]:
    rng = random.Random(f"prompts {seed} {held_out}")
    return [{"prompt": _film(rng, held_out)} for _ in range(num_rows)]


def demonstrations(num_rows: int, *, seed: int) -> list[dict[str, str]]:
    """Reviews of all opinions; one of eight is badly written."""
    rng = random.Random(f"demonstrations {seed}")
    return [
        {"prompt": _film(rng, False), "answer": _review(rng, 0.5, 1 / 8)} for _ in range(num_rows)
    ]


def preferences(num_rows: int, *, seed: int, held_out: bool = False) -> list[dict[str, object]]:
    """One to three pairs of reviews of one film, the one that a reader prefers first."""
    rng = random.Random(f"preferences {seed} {held_out}")
    rows: list[dict[str, object]] = []
    for _ in range(num_rows):
        pairs = list(_pairs(rng, rng.choice((1, 1, 2, 3))))
        rows.append(
            {
                "prompt": _film(rng, held_out),
                "pos_answers": [better for better, _ in pairs],
                "neg_answers": [worse for _, worse in pairs],
            }
        )
    return rows


def words() -> list[str]:
    """Texts with every word there is: what a tokenizer is made from."""
    films = [
        f"review of a {KINDS[i % len(KINDS)]} about {TOPICS[i % len(TOPICS)]} from {year} :"
        for i, year in enumerate((*YEARS, *YEARS))
    ]
    reviews = [
        f" the {thing} was {degree}{adjective}{joint}the {thing} was {adjective} ."
        for thing in THINGS
        for degree in DEGREES
        for adjective in PRAISE + BLAME
        for joint in JOINTS
    ]
    return films + reviews


def _film(rng: random.Random, held_out: bool) -> str:
    years = HELD_OUT_YEARS if held_out else [y for y in YEARS if y not in HELD_OUT_YEARS]
    return f"review of a {rng.choice(KINDS)} about {rng.choice(TOPICS)} from {rng.choice(years)} :"


def _review(rng: random.Random, kindness: float, slips: float) -> str:
    clauses = [
        f"the {thing} was {rng.choice(DEGREES)}"
        f"{rng.choice(PRAISE if rng.random() < kindness else BLAME)}"
        for thing in rng.sample(THINGS, rng.choice((2, 3)))
    ]
    text = clauses[0] + "".join(rng.choice(JOINTS) + clause for clause in clauses[1:])
    if rng.random() < slips:
        found = text.split()
        at = rng.randrange(len(found))
        # A word twice, or one too few.
        found[at : at + 1] = [found[at]] * 2 if rng.random() < 0.5 else []
        text = " ".join(found)
    return f" {text} ."


def _pairs(rng: random.Random, number: int) -> Iterator[tuple[str, str]]:
    """Any review is better than none; of two reviews, the kinder one."""
    while number:
        one, other = (_review(rng, rng.choice((0.2, 0.5, 0.8)), 1 / 4) for _ in range(2))
        better, worse = sorted((one, other), key=_rank, reverse=True)
        if _rank(better) > _rank(worse):
            yield better, worse
            number -= 1


def _rank(text: str) -> tuple[bool, float]:
    opinion, is_review = read(text)
    return is_review, opinion
