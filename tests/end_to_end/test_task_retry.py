"""Tasks that are tried again after a fault that passes: what was made meanwhile is kept."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engine import Engine, Environment, Trainer
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import StoreUnavailableError
from rlhf_flows.tasks.progress import NoProgress
from tests.end_to_end.whole_run import assert_same_bits, evaluated_versions, learn
from tests.toys import Rows, ToyPolicy, ToyReward, ToyTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("services")]


class Stumbles:
    """Of the shards whose samples are named like `on`, the first to come fails, once, while the
    next is at work: nobody hears that one's answer, and it is committed before the task is tried
    again.
    """

    def __init__(self, name: str, *, folder: Path, on: str) -> None:
        super().__init__(name)  # type: ignore[call-arg]
        self.folder = folder
        self.on = on

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        first = data["sample_id"][0]
        if not first.startswith(self.on):
            return super().forward_step(data)  # type: ignore[misc]
        try:
            (self.folder / "stumbled").touch(exist_ok=False)
        except FileExistsError:
            with (self.folder / "made").open("a") as file:
                file.write(f"{first}\n")
            time.sleep(0.4)
            return super().forward_step(data)  # type: ignore[misc]
        time.sleep(0.2)
        raise StoreUnavailableError("away for a moment")


class StumblingPolicy(Stumbles, ToyPolicy):
    pass


class StumblingReward(Stumbles, ToyReward):
    pass


class FirstReward(StumblingReward):
    """Comes first in its flow: nothing generates."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Rows:
        return Rows(prompts)

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        digit = data["prompt_row"] % 10
        return {"digit": digit, **super().forward_step({**data, "digit": digit})}


def assert_each_was_made_once(folder: Path, *, shards: int) -> None:
    made = (folder / "made").read_text().split()
    assert len(made) == len(set(made)) == shards


TWO: dict[str, Any] = {"num_replica": 2}


def test_in_rollout_and_evaluation(tmp_path: Path) -> None:
    sampled, evaluated = tmp_path / "sampled", tmp_path / "evaluated"
    sampled.mkdir()
    evaluated.mkdir()
    policy = StumblingPolicy("policy", folder=sampled, on="e000000")
    reward = StumblingReward("reward", folder=evaluated, on="v000001")
    engine = GRPOEngine(policy, ToyTrainer("trainer"), reward, name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_eval_dataset([{"prompt": f"eval {i}"} for i in range(16)])
    learn(engine, tmp_path, "r", num_episode=1, models={"policy": TWO, "reward": TWO})
    assert_each_was_made_once(sampled, shards=4)
    assert_each_was_made_once(evaluated, shards=2)
    assert evaluated_versions(tmp_path, "r") == [0, 1]


def test_in_scoring(tmp_path: Path) -> None:
    reward = FirstReward("reward", folder=tmp_path, on="e000000")
    trainer = ToyTrainer("trainer")
    engine = Engine(
        Environment(lambda b: reward.forward_step(b)),
        Trainer(lambda b: trainer.train_step(b)),
        name="offline",
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    learn(engine, tmp_path, "r", num_episode=1, models={"reward": TWO})  # type: ignore[arg-type]
    assert_each_was_made_once(tmp_path, shards=4)


class KnownTrainer(ToyTrainer):
    """Says which process it is in."""

    folder: Path

    def setup(self) -> None:
        super().setup()
        (self.folder / "pid").write_text(str(os.getpid()))


class KillsTrainer(NoProgress):
    """When the samplers have taken the first version: nobody asks it for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        if (phase, number) == ("param_sync", 1):
            os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)


def test_a_trainer_that_died_while_it_waited_for_samples_is_restored(tmp_path: Path) -> None:
    def engine(*, slow_s: float) -> GRPOEngine:
        trainer = KnownTrainer("trainer")
        trainer.folder = tmp_path
        found = GRPOEngine(ToyPolicy("policy", slow_s=slow_s), trainer, ToyReward("reward"))
        return found.set_dataset([{"prompt": str(i)} for i in range(64)])

    learn(engine(slow_s=0.0), tmp_path, "quick", num_episode=2)
    # Longer than a pool trusts a replica without a look at it.
    learn(engine(slow_s=1.5), tmp_path, "slow", num_episode=2, progress=KillsTrainer(tmp_path))
    assert_same_bits(tmp_path, "slow", reference="quick")
