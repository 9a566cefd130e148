"""Training while the last checkpoint is on its way to a slow store: in time, in order, to the bit.

The store of these runs is slow in the trainer's process alone, where folders are uploaded.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import RlhfFlowsError, StoreUnavailableError
from rlhf_flows.modules.base import ModuleContext
from tests.end_to_end.whole_run import (
    STEPS,
    assert_exactly_once,
    assert_same_bits,
    commits,
    evaluated_versions,
    learn,
    toy_engine,
)
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")

EPISODES = 4
SETTINGS: dict[str, Any] = {"num_episode": EPISODES, "max_staleness": 1, "eval_episode_interval": 1}


class SlowStoreTrainer(ToyTrainer):
    """Writes down when it trains and uploads; its first upload of version 2 may come to nothing."""

    def __init__(
        self, name: str, *, log: Path, upload_s: float = 0.0, upload_of_2: str = "", bad_step: int
    ) -> None:
        super().__init__(name)
        self.log, self.upload_s = log, upload_s
        self.upload_of_2, self.bad_step = upload_of_2, bad_step

    def attach(self, context: ModuleContext) -> None:
        super().attach(context)
        from rlhf_flows.store import local

        store: Any = local.LocalStore
        put_folder = store.put_folder

        def slowly(own: Any, folder: Path, prefix: str) -> Any:
            self._note(f"upload {prefix}")
            self._wait(prefix)
            if self.upload_of_2 and "checkpoints/version=000002" in prefix and self._is_first():
                if self.upload_of_2 == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise StoreUnavailableError("the store was away for too long")
            return put_folder(own, folder, prefix)

        store.put_folder = slowly

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self._note(f"step {iteration} {threading.current_thread() is threading.main_thread()}")
        if iteration == self.bad_step:
            raise ValueError("of the user's code")
        return super().train_step(data, iteration)

    def _wait(self, prefix: str) -> None:
        """`upload_s`; of a negative one at most that long, until the next episode is trained."""
        version = int(prefix.partition("version=")[2][:6])
        if self.upload_s < 0 and version == EPISODES:
            return
        deadline = time.monotonic() + abs(self.upload_s)
        while time.monotonic() < deadline:
            if self.upload_s < 0 and f" step {version * STEPS} " in self.log.read_text():
                return
            time.sleep(0.05)

    def _is_first(self) -> bool:
        try:
            self.log.with_suffix(".was").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _note(self, what: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{time.time()} {what}\n")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ahead")


@pytest.fixture(scope="module")
def quick(store: Path, services: str) -> str:
    """The run with a store that is not slow."""
    learn(toy_engine(), store, "quick", **SETTINGS)
    return "quick"


def slow_engine(store: Path, run: str, *, bad_step: int = -1, **trainer: Any) -> GRPOEngine:
    engine = GRPOEngine(
        ToyPolicy("policy"),
        SlowStoreTrainer("trainer", log=store / f"{run}.log", bad_step=bad_step, **trainer),
        ToyReward("reward"),
        name="toy",
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    return engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(16)])


def begins(store: Path, run: str) -> dict[int, float]:
    """When the first step of each episode began, the first time."""
    found: dict[int, float] = {}
    for line in (store / f"{run}.log").read_text().splitlines():
        at, what, *rest = line.split()
        if what == "step":
            found.setdefault(int(rest[0]) // STEPS, float(at))
    return found


def commit_times(store: Path, run: str) -> list[float]:
    paths = sorted((store / run / "episodes").glob("episode=*/trained.json"))
    return [path.stat().st_mtime for path in paths]


@pytest.mark.slow
def test_training_goes_on_while_a_slow_store_takes_the_checkpoint_before(
    store: Path, quick: str
) -> None:
    learn(slow_engine(store, "slow", upload_s=-60.0), store, "slow", **SETTINGS)
    begun, committed = begins(store, "slow"), commit_times(store, "slow")
    assert committed == sorted(committed)
    for episode in range(1, EPISODES):
        assert begun[episode] < committed[episode - 1], f"episode {episode} waited for the commit"
    for episode in range(2, EPISODES):
        # Its sampler took the version that training of the one before last committed.
        assert begun[episode] > committed[episode - 2]
    assert_same_bits(store, "slow", reference=quick)
    assert_exactly_once(store, "slow", episodes=EPISODES, staleness=1)
    assert evaluated_versions(store, "slow") == list(range(EPISODES + 1))


@pytest.mark.slow
def test_on_policy_training_waits_for_the_commit_and_works_as_ever(store: Path) -> None:
    learn(slow_engine(store, "on", upload_s=0.3), store, "on", num_episode=2)
    begun, committed = begins(store, "on"), commit_times(store, "on")
    assert begun[1] > committed[0]
    steps = [line for line in (store / "on.log").read_text().splitlines() if " step " in line]
    assert all(line.endswith("True") for line in steps), "on a thread beside the main one"


@pytest.mark.slow
@pytest.mark.parametrize("upload_of_2", ["dies", "fails"])
def test_a_version_whose_upload_comes_to_nothing_is_trained_again_to_the_same_bits(
    store: Path, quick: str, upload_of_2: str
) -> None:
    engine = slow_engine(store, upload_of_2, upload_s=1.0, upload_of_2=upload_of_2)
    learn(engine, store, upload_of_2, **SETTINGS)
    assert (store / f"{upload_of_2}.was").exists()
    assert_same_bits(store, upload_of_2, reference=quick)
    assert_exactly_once(store, upload_of_2, episodes=EPISODES, staleness=1)
    committed = commit_times(store, upload_of_2)
    assert committed == sorted(committed)


@pytest.mark.slow
def test_a_mistake_in_the_next_episode_costs_no_version_that_is_on_its_way(store: Path) -> None:
    engine = slow_engine(store, "bad", upload_s=-60.0, bad_step=STEPS)
    with pytest.raises(RlhfFlowsError, match="of the user's code"):
        learn(engine, store, "bad", **SETTINGS)
    assert begins(store, "bad")[1] < commit_times(store, "bad")[0]
    assert len(commits(store, "bad")) == 1
