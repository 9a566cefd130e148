"""Tables of samples: what came of one prompt under one version after another.

The decision here: prompts that were asked more than once stand side by side, a row a prompt and a
column a version. Those of an evaluation come every time; where a run has none, the prompts of
training that an epoch brought again do.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["one_a_prompt", "short", "side_by_side", "text"]

_MOST_CHARACTERS = 300
_SIDE_CHARACTERS = 160
"""Of a completion that stands beside others."""
_VERSIONS = 5
"""Side by side: more would be too narrow to read."""
_PROMPTS = 6

Previews = Sequence[Mapping[str, Any]]


def side_by_side(samples: Mapping[int, Previews], *, name: str) -> list[dict[str, str]]:
    """A row a prompt, a column a version: the reward, and what was completed.

    Shown are the first version, the newest, and some between, evenly apart.

    Args:
        samples: By policy version or by episode, a completion of each prompt or several.
        name: What the samples are counted by: "version" or "episode".
    """
    asked: dict[str, dict[int, Mapping[str, Any]]] = {}
    for number, previews in sorted(samples.items()):
        for preview in previews:
            by_number = asked.setdefault(str(preview.get("prompt")), {})
            by_number.setdefault(number, preview)
    often = [prompt for prompt, by_number in asked.items() if len(by_number) > 1]
    often.sort(key=lambda prompt: -len(asked[prompt]))
    prompts = often[:_PROMPTS]
    numbers = _spread(sorted({n for prompt in prompts for n in asked[prompt]}))
    return [
        {
            "prompt": text(prompt, most=_SIDE_CHARACTERS),
            **{f"{name} {n}": _cell(asked[prompt].get(n)) for n in numbers},
        }
        for prompt in prompts
    ]


def _spread(numbers: Sequence[int]) -> list[int]:
    """First and last, and of those between so many that `_VERSIONS` are left."""
    if len(numbers) <= _VERSIONS:
        return list(numbers)
    last = len(numbers) - 1
    return [numbers[round(i * last / (_VERSIONS - 1))] for i in range(_VERSIONS)]


def _cell(preview: Mapping[str, Any] | None) -> str:
    if preview is None:
        return ""
    completion = text(preview.get("completion"), most=_SIDE_CHARACTERS)
    reward = short(preview.get("reward"))
    return completion if reward is None else f"{reward:g} · {completion}"


def one_a_prompt(previews: Previews, *, most: int) -> list[Mapping[str, Any]]:
    """Samples of different prompts first."""
    seen: set[Any] = set()
    first: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for preview in previews:
        (others if preview.get("prompt") in seen else first).append(preview)
        seen.add(preview.get("prompt"))
    return [*first, *others][:most]


def short(value: float | None) -> float | None:
    """A number short enough to read: four digits behind the point, or three that say something."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.3g}") if abs(value) < 0.01 else round(value, 4)


def text(value: Any, *, most: int = _MOST_CHARACTERS) -> str:
    """One line of plain text, cut with an ellipsis: what steers a terminal or the direction of
    writing is shown as a sign of its own, since models write that, too.
    """
    line = str(value) if value is not None else ""
    line = line[: 2 * most].replace("\r\n", "\n").replace("\n", " ⏎ ").replace("\t", " ")
    line = "".join(c if unicodedata.category(c) not in _STEERING else "�" for c in line)
    return line if len(line) <= most else line[: most - 1] + "…"


_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories: control, format (such as right-to-left marks), lone surrogates, breaks."""
