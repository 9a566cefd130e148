"""Seeds of chaos: from each a run, its victims and the instants of their deaths; then the audit.

A seed is one small whole run on a real Ray head, a real Prefect server and a real store. Its first
victim dies at a named point (the seeds go through all of them in turn), the others at named points
or at random times. A flow that died is started again, as a person or an automation would; workers
are the run's own business. At the end the run must be, to the bit, the undisturbed one. Of which
modules it is made, and who is a victim where, is the affair of kinds.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_flows.store import open_store, scan, sweep_run
from tests.chaos.kinds import KINDS, SECOND_RANK
from tests.chaos.points import Order
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    evaluated_versions,
)

__all__ = ["Campaign", "Outcome", "table"]

ROOT = Path(__file__).parents[2]
EPISODES = 3
RUNTIME: dict[str, Any] = {
    "num_episode": EPISODES,
    "eval_episode_interval": 1,
    "keep_last": 1,
    "shard_timeout_s": 60.0,
    "max_replica_restarts": 4,
    "collective_timeout_s": 20.0,
}
MOST_ATTEMPTS = 8
PATIENCE_S = 120.0
_RANK_POINTS = ("before a step", "in the middle of a step", "after a step")
_START_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How one victim of a seed is to die."""

    who: str
    point: str | None = None
    visit: int = 1
    after_s: float = 0.0
    """For one without a point: seconds after its attempt started."""

    @property
    def where(self) -> str:
        return self.point or "at a random time"


@dataclass(slots=True, kw_only=True)
class Outcome:
    seed: int
    deaths: list[Death]
    died: list[bool] = field(default_factory=list)
    """Of each death, whether it came to it."""
    attempts: int = 0
    seconds: float = 0.0
    failure: str = ""
    """Why the run is not the undisturbed one; empty where it is."""


class Campaign:
    """Runs seeds one after another, on services that are there."""

    def __init__(self, root: Path, *, address: str, kind: str = "toys") -> None:
        """
        Args:
            kind: One of `KINDS`.
        """
        self.root = root
        self.kind, self._of = kind, KINDS[kind]
        self.store = root / "store"
        self.address = address
        self.usual_s = 10.0
        self._zygote = _Zygote()

    def close(self) -> None:
        self._zygote.close()

    def undisturbed(self) -> None:
        """The run that all others are held against."""
        started = time.monotonic()
        folder = self._folder("undisturbed")
        pid = self._zygote.fork(self._settings("undisturbed", folder, ranks=self._of.ranks))
        while (code := self._zygote.poll(pid)) is None:
            assert time.monotonic() - started < _START_S, _tail(folder)
            time.sleep(0.1)
        assert code == 0, _tail(folder)
        self.usual_s = time.monotonic() - started

    def run(self, seed: int) -> Outcome:
        outcome = Outcome(seed=seed, deaths=deaths_of(seed, self.usual_s, kind=self.kind))
        started = time.monotonic()
        run = f"seed-{seed:05d}"
        try:
            self._live_through(run, outcome)
            self._audit(run)
        except _NotExactError as e:
            outcome.failure = str(e)
        except Exception:  # whatever the audit stumbles over: the campaign goes on
            outcome.failure = traceback.format_exc()[-2000:]
        outcome.seconds = time.monotonic() - started
        return outcome

    def _live_through(self, run: str, outcome: Outcome) -> None:
        folder = self._folder(run)
        settings = self._settings(run, folder, ranks=self._of.ranks_of(outcome.seed))
        left = list(outcome.deaths)
        while True:
            outcome.attempts += 1
            if outcome.attempts > MOST_ATTEMPTS:
                raise _NotExactError(f"not through after {MOST_ATTEMPTS} attempts: {_tail(folder)}")
            pid = self._zygote.fork(settings)
            code = self._watch(pid, folder, left, outcome)
            if code == 0:
                outcome.died += [False] * len(left)
                return
            if code != -signal.SIGKILL:
                raise _NotExactError(f"the flow ended with {code}: {_tail(folder)}")

    def _watch(self, pid: int, folder: Path, left: list[Death], outcome: Outcome) -> int:
        """Sees to the deaths that are due in this attempt; its exit status."""
        started = time.monotonic()
        due: Death | None = None
        while True:
            if due is None and left:
                due = left[0]
                if due.point is not None:
                    Order(who=due.who, point=due.point, visit=due.visit).write(folder)
            if due is not None and self._carried_out(due, pid, folder, time.monotonic() - started):
                outcome.died.append(True)
                left.pop(0)
                due = None
            code = self._zygote.poll(pid)
            if code is not None:
                if due is not None and due.point is not None and Order.carried_out(folder):
                    outcome.died.append(True)
                    left.pop(0)
                return code
            if time.monotonic() - started > PATIENCE_S + 4 * self.usual_s:
                os.kill(pid, signal.SIGABRT)
                self._zygote.wait(pid)
                raise _NotExactError(f"hung: {_tail(folder)}")
            time.sleep(0.02)

    def _carried_out(self, due: Death, flow: int, folder: Path, elapsed_s: float) -> bool:
        if due.point is not None:
            return Order.carried_out(folder)
        if elapsed_s < due.after_s:
            return False
        victim = flow if due.who == "flow" else _pid_of(folder, due.who)
        if victim is None or _is_over(victim):
            return False
        os.kill(victim, signal.SIGKILL)
        return True

    def _audit(self, run: str) -> None:
        assert_same_bits(self.store, run, reference="undisturbed")
        assert_exactly_once(self.store, run, episodes=EPISODES, staleness=self._of.staleness)
        assert evaluated_versions(self.store, run) == list(range(EPISODES + 1))
        # What the killed left behind is found and goes; then nothing is there that should not be.
        sweep_run(open_store(str(self.store)), run, older_than_s=0.0)
        missing = _keys(self.store, "undisturbed") ^ _keys(self.store, run)
        assert not missing, f"other objects than the undisturbed run: {sorted(missing)}"
        state = scan(open_store(str(self.store)), run)
        assert state.trained_episodes == EPISODES
        actors = _actors(f"rlhf_flows/{run}")
        assert not actors, f"actors were left: {actors}"

    def _folder(self, run: str) -> Path:
        folder = self.root / "orders" / run
        folder.mkdir(parents=True)
        return folder

    def _settings(self, run: str, folder: Path, *, ranks: int) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "run": run,
            "folder": str(folder),
            "address": self.address,
            "models": {"trainer": {"ranks_per_replica": ranks}},
            "runtime": {**RUNTIME, **self._of.runtime},
            "kind": self.kind,
        }


def deaths_of(seed: int, usual_s: float, *, kind: str = "toys") -> list[Death]:
    """One to four deaths; the first at the named points whose turn it is."""
    draws, of = random.Random(seed), KINDS[kind]
    deaths = []
    for turn in range(seed * of.in_turn, (seed + 1) * of.in_turn):
        who, point = of.points[turn % len(of.points)]
        deaths.append(Death(who=who, point=point, visit=1 + (turn // len(of.points)) % 4))
    for _ in range(draws.randrange(3)):
        if draws.random() < 0.5:
            who, point = draws.choice(of.points)
            deaths.append(Death(who=who, point=point, visit=draws.randint(1, 4)))
        else:
            victim = draws.choice(of.victims)
            deaths.append(Death(who=victim, after_s=draws.uniform(0.0, usual_s)))
    if of.in_turn > 1:
        # The third death of a trainer in one phase ends the attempt: its task is tried three times.
        deaths[of.in_turn :] = [d for d in deaths[of.in_turn :] if "trainer" not in d.who]
    if of.ranks_of(seed) > of.ranks:
        point = draws.choice((None, *_RANK_POINTS))
        after_s = draws.uniform(0.0, usual_s)
        visit = draws.randint(1, 4)
        deaths.append(Death(who=SECOND_RANK, point=point, visit=visit, after_s=after_s))
    return deaths


def table(outcomes: Sequence[Outcome]) -> str:
    """Victim x point: how often it died there, and in how many exact runs."""
    died: Counter[tuple[str, str]] = Counter()
    exact: Counter[tuple[str, str]] = Counter()
    unreached: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        flags = outcome.died + [False] * (len(outcome.deaths) - len(outcome.died))
        for death, happened in zip(outcome.deaths, flags, strict=True):
            where = death.who, death.where
            (died if happened else unreached)[where] += 1
            exact[where] += happened and not outcome.failure
    lines = ["| victim | dies | times | in exact runs | not reached |", "|---|---|---|---|---|"]
    for who, where in sorted({*died, *unreached}):
        key = who, where
        lines.append(f"| {who} | {where} | {died[key]} | {exact[key]} | {unreached[key]} |")
    return "\n".join(lines)


class _NotExactError(Exception):
    """The run did not come to its end."""


class _Zygote:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def fork(self, settings: dict[str, Any]) -> int:
        return int(self._ask(settings)["pid"])

    def wait(self, pid: int) -> int:
        return int(self._ask({"wait": pid})["code"])

    def poll(self, pid: int) -> int | None:
        return self.wait(pid) if _is_over(pid) else None

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks attempts has died"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _is_over(pid: int) -> bool:
    """Gone, or a zombie: who cannot be killed any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def _pid_of(folder: Path, who: str) -> int | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((folder / f"pid-{who}").read_text())
    return None


def _tail(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def _keys(store: Path, run: str) -> set[str]:
    """Below the run: everything but who the attempts were and how folders are called."""
    root = store / run
    return {
        re.sub(r"-[0-9a-f]{32}", "-uuid", str(path.relative_to(root)))
        for path in root.rglob("*")
        if path.is_file() and path.parent.name != "attempts"
    }


def _actors(namespace: str) -> list[str]:
    import ray

    deadline = time.monotonic() + 10
    while True:
        found = [
            a["name"]
            for a in ray.util.list_named_actors(all_namespaces=True)
            if a["namespace"] == namespace
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def campaign(
    root: Path, seeds: Sequence[int], *, address: str, kind: str = "toys"
) -> Iterator[Outcome]:
    """The outcome of each seed, as it comes."""
    chaos = Campaign(root, address=address, kind=kind)
    try:
        chaos.undisturbed()
        for seed in seeds:
            yield chaos.run(seed)
    finally:
        chaos.close()
