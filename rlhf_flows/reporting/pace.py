"""How long a run has to go, from how long its last episodes took.

The decision here: measured from the end of one episode to the end of another, ten back at most.
Phases overlap and differ in length, so that anything shorter than a whole episode says little; and
what the first episodes took, while things warmed up, says little of the last.
"""

from __future__ import annotations

from collections import deque

__all__ = ["Pace", "in_words"]

_EPISODES = 10


class Pace:
    """Told when the run began to work and whenever an episode is through."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque(maxlen=_EPISODES + 1)

    def mark(self, share: float, *, at_s: float) -> None:
        """At `at_s` of any clock, `share` of the run was done, between 0 and 1."""
        self._marks.append((at_s, share))

    @property
    def has_begun(self) -> bool:
        return bool(self._marks)

    @property
    def is_known(self) -> bool:
        return len(self._marks) > 1 and self._marks[-1][1] > self._marks[0][1]

    @property
    def whole_s(self) -> float | None:
        """Seconds of a whole run at this pace; None before the end of the first episode."""
        if not self.is_known:
            return None
        (t0, share0), (t1, share1) = self._marks[0], self._marks[-1]
        return (t1 - t0) / (share1 - share0)

    def left_s(self, *, at_s: float) -> float | None:
        """Seconds to go at `at_s`; None before the end of the first episode."""
        if (whole_s := self.whole_s) is None:
            return None
        marked_s, share = self._marks[-1]
        return max(0.0, (1.0 - share) * whole_s - (at_s - marked_s))


def in_words(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "3 h 05 min", "2 d 04 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
