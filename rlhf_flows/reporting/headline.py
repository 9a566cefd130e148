"""Which metrics stand in a line or a table that has room for a few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["headline"]

_BOOKKEEPING = frozenset({"rows", "rows_trained", "rows_filtered", "tokens", "gap_tokens"})

_OF_SAMPLES = frozenset({"reward", "exact", "response_length"})


def headline(names: Iterable[str], wanted: Sequence[str], *, most: int = 6) -> list[str]:
    """The wanted names that are there, those of several modules (`ppo_policy/loss`) among them;
    then losses of any name; where there is none of either, whatever was measured of the samples.
    """
    there = list(dict.fromkeys(names))
    seen: set[str] = set()
    for name in list(there):
        # Trainers of the same samples measure the same of them.
        if (last := _last(name)) in _OF_SAMPLES and last in seen:
            there.remove(name)
        seen.add(last)
    order = {name: i for i, name in enumerate(wanted)}
    chosen = sorted((n for n in there if _last(n) in order), key=lambda n: order[_last(n)])
    chosen += [n for n in there if n not in chosen and _last(n).endswith("loss")]
    chosen = chosen or [
        n for n in there if _last(n) not in _BOOKKEEPING and not n.endswith("seconds")
    ]
    return chosen[:most]


def _last(name: str) -> str:
    return name.rpartition("/")[2]
