"""Named stopwatches for code in a module: what they measure in a step stands beside its metrics."""

from __future__ import annotations

import time
from types import TracebackType

from rlhf_flows.errors import ConfigError

__all__ = ["Timer", "Timers"]


class Timer:
    """Seconds between `start` and `stop`, added up; also as `with timers("name"):`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        if self._started is not None:
            raise ConfigError(f"timer {self.name!r} runs already: stop it before it is started")
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is None:
            raise ConfigError(f"timer {self.name!r} does not run: start it before it is stopped")
        self.seconds += time.perf_counter() - self._started
        self._started = None

    def elapsed(self, reset: bool = True) -> float:
        """Seconds so far."""
        seconds = self.seconds
        if self._started is not None:
            seconds += time.perf_counter() - self._started
        if reset:
            self.seconds = 0.0
        return seconds

    def __enter__(self) -> Timer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class Timers:
    """`timers("name")` is the stopwatch of that name, made when it is first asked for."""

    def __init__(self) -> None:
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self._timers.setdefault(name, Timer(name))

    def take(self) -> dict[str, float]:
        """Seconds by name, of those that measured anything; they start from zero again."""
        taken = {name: timer.elapsed() for name, timer in self._timers.items()}
        return {name: seconds for name, seconds in taken.items() if seconds}
