"""Graphs of all shapes as whole runs: modules shared by flows, called twice, ordered, evaluated."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf_flows import (
    ControlDependencies,
    Engine,
    Environment,
    EpisodeRelayBuffer,
    Evaluator,
    Trainer,
)
from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import ConfigError, DataError, RunCancelledError
from tests.end_to_end.whole_run import (
    RUNTIME,
    assert_exactly_once,
    commits,
    learn,
    toy_engine,
    weight_digests,
)
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")

PROMPTS = [{"prompt": str(i)} for i in range(64)]
HELD_OUT = [{"prompt": f"eval {i}"} for i in range(16)]


class Learner(ToyPolicy, ToyTrainer):
    """Samples and learns in one process, with one set of weights."""

    def __init__(self, name: str) -> None:
        ToyPolicy.__init__(self, name)
        self.learning_rate, self.slow_s = 0.2, 0.0

    def setup(self) -> None:
        ToyTrainer.setup(self)


def engine_of(
    env_flow: Callable[[Any], Any],
    trainer_flow: Callable[[Any], Any],
    eval_flow: Callable[[Any], Any] | None = None,
) -> Engine:
    evaluator = None if eval_flow is None else Evaluator(eval_flow).set_dataset(HELD_OUT)
    engine = Engine(Environment(env_flow), Trainer(trainer_flow), evaluator, name="toy")
    return engine.set_dataset(PROMPTS)


def run(engine: Engine, store: Path, name: str, **runtime: Any) -> Any:
    return engine.learn(
        run_name=name,
        store={"url": str(store), "retry_budget_s": 2.0},
        runtime={**RUNTIME, **runtime},
    )


def episode(store: Path, name: str, phase: str, number: int = 0) -> pd.DataFrame:
    return pd.read_parquet(store / name / f"episodes/episode={number:06d}/{phase}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flows")


@pytest.mark.slow
def test_a_module_that_samples_learns_and_is_evaluated_gives_what_two_synced_ones_give(
    store: Path, services: str
) -> None:
    learner, reward = Learner("learner"), ToyReward("reward")
    engine = engine_of(
        lambda batch: reward.forward_step(learner.forward_step(batch)),
        lambda batch: learner.train_step(batch),
        lambda batch: (sampled := learner.eval_step(batch), reward.eval_step(sampled)),
    )
    alone = run(engine, store, "alone", eval_episode_interval=1)
    two = GRPOEngine(ToyPolicy("policy"), ToyTrainer("trainer"), ToyReward("reward"), name="toy")
    two.set_dataset(PROMPTS).set_eval_dataset(HELD_OUT)
    synced = learn(two, store, "synced", eval_episode_interval=1)
    assert weight_digests(store, "alone", "learner") == weight_digests(store, "synced")
    assert alone.evaluations == synced.evaluations
    assert_exactly_once(store, "alone", episodes=RUNTIME["num_episode"])

    with pytest.raises(ConfigError, match="'learner' is trained and asked in the environment"):
        run(engine, store, "lagging", max_staleness=1)


@pytest.mark.long
def test_a_module_called_twice_several_outputs_and_an_order_without_data(
    store: Path, services: str
) -> None:
    policy, trainer, second = ToyPolicy("policy"), ToyTrainer("trainer"), ToyTrainer("second")
    near, far = ToyReward("near"), ToyReward("far", goal=1)

    def named(out: str) -> Callable[[Any], Any]:
        return functools.partial(near.renamed, to=out)  # type: ignore[attr-defined]

    class Renaming(ToyReward):
        def renamed(self, data: Mapping[str, Any], to: str) -> dict[str, Any]:
            """Any method may be a node; what is no batch reaches it as an option."""
            return {to: self.forward_step(dict(data))["reward"]}

    near = Renaming("near")

    def env_flow(batch: Any) -> dict[str, Any]:
        sampled = policy.forward_step(batch)
        print("a call of nothing that is a module is ignored")
        return {
            "first": named("once")(sampled),
            "others": [named("twice")(sampled), (far.forward_step(sampled), sampled)],
        }

    def trainer_flow(batch: Any) -> None:
        done = trainer.train_step(batch)  # type: ignore[call-arg]
        with ControlDependencies(done):
            second.train_step(batch)  # type: ignore[call-arg]

    run(engine_of(env_flow, trainer_flow), store, "shapes", num_episode=1)
    scored = episode(store, "shapes", "scoring")
    assert {"once", "twice", "reward", "exact"} <= set(scored.columns)
    assert (scored["once"] == scored["twice"]).all()
    assert not (scored["once"] == scored["reward"]).all()
    (commit,) = commits(store, "shapes")
    assert set(commit["checkpoints"]) == {"trainer", "second"}


def test_the_batches_of_an_evaluation_come_back_and_are_post_processed(
    store: Path, services: str
) -> None:
    policy, reward = ToyPolicy("policy"), ToyReward("reward")
    seen: list[dict[str, Any]] = []

    def eval_flow(batch: Any) -> Any:
        return reward.eval_step(policy.eval_step(batch))

    def look(results: dict[str, list[Any]], about: dict[str, Any]) -> dict[str, float]:
        seen.append(about)
        return {"largest": max(float(batch["reward"].max()) for batch in results["reward"])}

    evaluator = Evaluator(eval_flow).set_dataset(HELD_OUT).set_post_process_func(look)
    engine = Engine(evaluator=evaluator, name="toy").configure(
        {"run_name": "only", "store": {"url": str(store)}, "runtime": {"generation_batch_size": 8}}
    )
    results = engine.evaluate()
    assert list(results) == ["reward"]
    assert [len(batch["sample_id"]) for batch in results["reward"]] == [8, 8]
    assert seen == [
        {"run": "only", "policy_version": 0, "episode_iteration": 0, "train_iteration": 0}
    ]
    assert engine.evaluate().keys() == results.keys()  # read, not made again
    assert len(seen) == 1


@pytest.mark.long
def test_an_engine_evaluates_the_newest_version_of_its_run_and_trains_nothing(
    store: Path, services: str
) -> None:
    engine = GRPOEngine(ToyPolicy("policy"), ToyTrainer("trainer"), ToyReward("reward"), name="toy")
    engine.set_dataset(PROMPTS)
    learn(engine, store, "later", num_episode=2)
    engine.set_eval_dataset(HELD_OUT)
    (batches,) = {len(b) for b in engine.evaluate().values()}
    assert batches == 2
    done = list((store / "later/evaluations").glob("*/*/done.json"))
    assert [path.parts[-3] for path in done] == ["version=000002"]
    assert len(commits(store, "later")) == 2


@pytest.mark.slow
def test_a_run_that_another_thread_stops_says_so_and_is_resumed(store: Path, services: str) -> None:
    engine = GRPOEngine(
        ToyPolicy("policy"), ToyTrainer("trainer", slow_s=0.3), ToyReward("reward"), name="toy"
    ).set_dataset(PROMPTS)

    def stop_soon() -> None:
        while not commits(store, "stopped"):
            time.sleep(0.05)
        engine.stop()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with pytest.raises(RunCancelledError, match=r"stopped by engine\.stop"):
        learn(engine, store, "stopped", num_episode=50)
    thread.join()
    reached = len(commits(store, "stopped"))
    assert 0 < reached < 50
    result = learn(engine, store, "stopped", num_episode=reached + 1)
    assert result.resumed_at == reached


@pytest.mark.long
def test_several_datasets_are_mixed_by_their_ratio(store: Path, services: str) -> None:
    engine = GRPOEngine(ToyPolicy("policy"), ToyTrainer("trainer"), ToyReward("reward"), name="toy")
    engine.set_multiple_datasets(
        [[{"prompt": f"a{i}"} for i in range(3)], [{"prompt": f"b{i}"} for i in range(50)]]
    )
    learn(engine, store, "mixed", num_episode=2, data_ratio=[1, 3])
    for number in range(2):
        prompts = episode(store, "mixed", "rollout", number)["prompt"]
        assert prompts.str.startswith("a").sum() == 8
        assert prompts.str.startswith("b").sum() == 24


def best_of_all(buffers: list[EpisodeRelayBuffer]) -> list[dict[str, Any]]:
    """The better half of all samples that it is shown."""
    samples = [sample for buffer in buffers for sample in buffer]
    samples.sort(key=lambda sample: (-sample["reward"], sample["sample_id"]))
    return samples[: len(samples) // 2]


@pytest.mark.slow
def test_relayed_samples_are_trained_on_and_again_after_a_death(store: Path, services: str) -> None:
    def engine(trainer: ToyTrainer) -> GRPOEngine:
        made = GRPOEngine(ToyPolicy("policy"), trainer, ToyReward("reward"), name="toy")
        return made.set_dataset(PROMPTS).set_relay_sample_manager(best_of_all)

    relay: dict[str, Any] = {
        "max_relay_episode": 2,
        "stream_data_loader_type": "dynamic",
        "save_episode_interval": 3,
    }
    learn(engine(ToyTrainer("trainer")), store, "relayed", num_episode=3, **relay)
    # Half of one episode, then half of two: the function is shown the last two.
    assert [c["rows"]["trained"] for c in commits(store, "relayed")] == [16, 32, 32]

    before = weight_digests(store, "relayed")
    for path in (store / "relayed/episodes").glob("episode=000002/trained.json"):
        path.unlink()
    learn(engine(ToyTrainer("trainer")), store, "relayed", num_episode=3, **relay)
    assert weight_digests(store, "relayed") == before  # trained again from the start

    fixed = {**relay, "stream_data_loader_type": "fixed"}
    with pytest.raises(DataError, match="16 samples, the stream is fixed at 32"):
        learn(engine(ToyTrainer("trainer")), store, "fixed", num_episode=1, **fixed)
    with pytest.raises(ConfigError, match=r"runtime\.max_relay_episode is 0"):
        learn(engine(ToyTrainer("trainer")), store, "never", num_episode=1)


@pytest.mark.long
def test_a_module_may_be_synced_less_often_than_others_or_never(store: Path, services: str) -> None:
    two = {"policy": {"sync_frequency": 2}}
    learn(toy_engine(eval_rows=0), store, "every-second", num_episode=4, models=two)
    never = {"policy": {"sync_frequency": 0}}
    learn(toy_engine(eval_rows=0), store, "never-synced", num_episode=2, models=never)
    for name, versions in (("every-second", [0, 0, 2, 2]), ("never-synced", [0, 0])):
        sampled = [
            set(episode(store, name, "rollout", number)["policy_version"])
            for number in range(len(versions))
        ]
        assert sampled == [{v} for v in versions]
