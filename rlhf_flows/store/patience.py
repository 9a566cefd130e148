"""How long a store that does not answer is waited for: the one place where requests are repeated.

The decision here: the budget belongs to the outage, not to the request. What one request has
learned, all know: once a store has been away for the whole budget, whatever is asked next (a task's
retry, the record of the end) gets one try and no second budget. Any answer ends the outage. A
request that alone keeps failing, on a store that answers others, has a budget of its own.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rlhf_flows.errors import StoreError, StoreUnavailableError

__all__ = ["BRIEF_S", "Patience"]

BRIEF_S = 10.0
"""Enough for a hiccup, and soon enough to be told of a wrong address."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_QUIET_S = 30.0
"""Failures with a longer pause between them, in which nobody asked, are two outages."""
_FIRST_WARNING_S = 1.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class _Outage:
    """Failures without any answer between them. Times are of the monotonic clock."""

    began_s: float
    failed_s: float
    """When the last failure was heard of."""
    warn_after_s: float = _FIRST_WARNING_S
    """Next warning once it lasts for this long: few lines, however long and however many wait."""


class Patience:
    """Repeats requests to one store, from any number of threads, for at most `budget_s`."""

    def __init__(self, budget_s: float = BRIEF_S) -> None:
        self.budget_s = budget_s
        self._is_exhausted = False
        self._outage: _Outage | None = None
        self._lock = threading.Lock()

    def keep_trying(self, request: Callable[[], T]) -> T:
        """What `request` returns, once it does; other errors than those that may pass go through.

        It is called again after a `StoreUnavailableError`, so what it does must bear repetition.
        Raises `StoreUnavailableError` when the store was away for `budget_s`: the request may then
        have taken effect or not.
        """
        first_s: float | None = None
        for tries in itertools.count(1):
            tried_s = time.monotonic()
            try:
                answer = request()
            except StoreUnavailableError as error:
                first_s = tried_s if first_s is None else first_s
                away_s = time.monotonic() - min(first_s, self._began(tried_s))
                left_s = self.budget_s - away_s
                if left_s <= 0 or self._is_exhausted:
                    said = str(error) if str(error).endswith("?") else f"{error}."
                    raise StoreUnavailableError(
                        f"{said} Given up after {away_s:.0f} s without success and {tries}"
                        f" {'try' if tries == 1 else 'tries'} of this request"
                        " (store.retry_budget_s is how long a run waits). Start again once that is"
                        " mended: a run goes on from what it has stored"
                    ) from error
                self._warn(error, away_s, left_s)
                time.sleep(min(_pause_s(tries), left_s))
            except StoreError:  # a refusal is an answer
                self._answered()
                raise
            else:
                self._answered()
                return answer
        raise AssertionError("the loop returns or raises")

    def exhaust(self) -> None:
        """Wait no more: from now on each request gets one try."""
        self._is_exhausted = True

    def _began(self, tried_s: float) -> float:
        """When the outage began that a request, sent at `tried_s` and failed now, belongs to."""
        with self._lock:
            if self._outage is None or tried_s - self._outage.failed_s > _QUIET_S:
                self._outage = _Outage(tried_s, tried_s)
            self._outage.failed_s = time.monotonic()
            return self._outage.began_s

    def _warn(self, error: StoreUnavailableError, away_s: float, left_s: float) -> None:
        with self._lock:
            if self._outage is None or away_s < self._outage.warn_after_s:
                return
            self._outage.warn_after_s = 2 * away_s
        logger.warning("waiting for the store, %.0f s more at most: %s", left_s, error)

    def _answered(self) -> None:
        if self._outage is None:  # without the lock: so it is for nearly every request
            return
        with self._lock:
            outage, self._outage = self._outage, None
        if outage is not None and outage.warn_after_s > _FIRST_WARNING_S:
            logger.warning(
                "the store answers again, after %.0f s", time.monotonic() - outage.began_s
            )


def _pause_s(tries: int) -> float:
    """Twice as long each time, up to a limit; at random, so that workers do not come at once."""
    return min(_FIRST_PAUSE_S * 2.0**tries, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
