"""Undisturbed runs: five phases, every sample once, the same bits however the run is cut."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engine import Engine, Environment, Evaluator, Trainer
from rlhf_flows.errors import (
    ConfigError,
    DataError,
    ResourcesError,
    RunConflictError,
    ShardError,
)
from tests.duckdb_process import query
from tests.end_to_end.processes import pids
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    commits,
    evaluated_versions,
    learn,
    samples,
    shard_digests,
    toy_engine,
    weight_digests,
)
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")


class Phases:
    """A progress that writes down which phases ran, in order."""

    def __init__(self) -> None:
        self.finishes: list[tuple[str, int]] = []

    def begin(self, run: str, num_episode: int) -> None: ...
    def started(self, phase: str, number: int, total: int) -> None: ...
    def advanced(self, phase: str, number: int, done: int) -> None: ...
    def samples(self, episode: int, previews: Any) -> None: ...
    def incident(self, kind: str, what: str, facts: Any) -> None: ...
    def held_out(self, version: int, previews: Any) -> None: ...

    def finished(self, phase: str, number: int, seconds: float, metrics: Any) -> None:
        self.finishes.append((phase, number))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(store: Path, services: str) -> Any:
    """The undisturbed on-policy run that others are compared with, and what it reported."""
    phases = Phases()
    result = learn(toy_engine(), store, "plain", progress=phases, eval_episode_interval=1)
    return result, phases


def test_an_on_policy_run_is_five_phases_episode_by_episode(plain: Any) -> None:
    result, phases = plain
    order = phases.finishes
    assert sorted(order) == sorted(
        [(p, e) for e in range(3) for p in ("rollout", "scoring", "training")]
        + [(p, v) for v in range(4) for p in ("param_sync", "evaluation")]
    )
    for e in range(3):
        chain = [("param_sync", e), ("rollout", e), ("scoring", e), ("training", e)]
        chain.append(("param_sync", e + 1))
        assert [order.index(link) for link in chain] == sorted(order.index(k) for k in chain)
    assert result.version == 3
    assert result.resumed_at == 0
    assert set(result.seconds) == {"rollout", "scoring", "training", "param_sync", "evaluation"}


def test_every_sample_is_sampled_scored_and_trained_once(plain: Any, store: Path) -> None:
    assert_exactly_once(store, "plain", episodes=3)


def test_the_policy_gets_better_and_is_evaluated_before_during_and_after(
    plain: Any, store: Path
) -> None:
    result, _ = plain
    assert evaluated_versions(store, "plain") == [0, 1, 2, 3]
    assert list(result.evaluations) == [0, 1, 2, 3]
    assert result.evaluations[3]["reward"] > result.evaluations[0]["reward"]
    assert result.episodes[2]["reward"] == pytest.approx(
        samples(store, "plain", "scoring").query("episode == 2")["reward"].mean()
    )


def test_duckdb_reads_the_episodes_of_a_run(plain: Any, store: Path) -> None:
    glob = f"{store}/plain/episodes/*/{{}}/*.parquet"
    rows = query(
        f"""select episode, count(*), count(distinct sample_id), min(policy_version),
                   max(policy_version), avg(reward)
            from read_parquet('{glob.format("rollout")}', hive_partitioning=true) as sampled
            join read_parquet('{glob.format("scoring")}', hive_partitioning=true) as scored
            using (episode, sample_id) group by episode order by 1"""
    )
    assert [row[1:5] for row in rows] == [[32, 32, e, e] for e in range(3)]


@pytest.mark.slow
def test_another_number_of_replicas_gives_the_same_bits(plain: Any, store: Path) -> None:
    learn(
        toy_engine(),
        store,
        "two",
        models={"policy": {"num_replica": 2}, "reward": {"num_replica": 2}},
        eval_episode_interval=1,
    )
    assert_same_bits(store, "two", reference="plain")


def test_another_shard_size_gives_the_same_samples_and_weights(plain: Any, store: Path) -> None:
    learn(toy_engine(eval_rows=0), store, "wide", generation_batch_size=16)
    assert weight_digests(store, "wide") == weight_digests(store, "plain")
    assert samples(store, "wide").equals(samples(store, "plain"))
    assert len(shard_digests(store, "wide")) == 3 * 2 * 2


@pytest.mark.slow
def test_staleness_one_samples_from_the_version_before(store: Path) -> None:
    learn(toy_engine(), store, "stale", num_episode=5, max_staleness=1, eval_episode_interval=2)
    assert_exactly_once(store, "stale", episodes=5, staleness=1)
    assert evaluated_versions(store, "stale") == [0, 2, 4, 5]
    # Overlap changes nothing of what is computed.
    learn(
        toy_engine(),
        store,
        "stale2",
        num_episode=5,
        max_staleness=1,
        eval_episode_interval=2,
        models={"policy": {"num_replica": 2}},
    )
    assert_same_bits(store, "stale2", reference="stale")


def test_sync_frequency_two_samples_every_second_version(store: Path) -> None:
    learn(toy_engine(), store, "every2", num_episode=4, sync_frequency=2, eval_episode_interval=1)
    versions = samples(store, "every2").groupby("episode")["policy_version"].unique()
    assert [list(v) for v in versions] == [[0], [0], [2], [2]]
    # A version that never reached the samplers cannot be evaluated.
    assert evaluated_versions(store, "every2") == [0, 2, 4]


# ---- engines of other shapes ------------------------------------------------------------------


class RowTrainer(ToyTrainer):
    """Learns from the rows themselves: what a supervised trainer does."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        from tests.toys import Rows

        class Labelled(Rows):
            def __getitem__(self, index: int) -> dict[str, Any]:
                return {"digit": index % 10, "reward": float(index % 10 == 3)}

        return Labelled(prompts)


def test_an_engine_without_environment_trains_on_its_rows(store: Path) -> None:
    trainer = RowTrainer("trainer")
    engine = Engine(trainer=Trainer(lambda b: trainer.train_step(b)), name="rows")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    result = learn(engine, store, "rows", num_episode=2, num_inference_per_prompt=1)  # type: ignore[arg-type]
    assert result.version == 2
    assert set(result.seconds) == {"training"}
    assert [c["rows"]["trained"] for c in commits(store, "rows")] == [32, 32]
    assert shard_digests(store, "rows") == {}


class RowReward(ToyReward):
    """Comes first in its flow: nothing generates."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        from tests.toys import Rows

        return Rows(prompts)

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        digit = data["prompt_row"] % 10
        return {"digit": digit, **super().forward_step({"digit": digit})}


def test_an_environment_in_which_nothing_generates_is_scoring_alone(store: Path) -> None:
    reward, trainer = RowReward("reward"), ToyTrainer("trainer")
    engine = Engine(
        Environment(lambda b: reward.forward_step(b)),
        Trainer(lambda b: trainer.train_step(b)),
        name="offline",
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    result = learn(engine, store, "offline", num_episode=2)  # type: ignore[arg-type]
    assert set(result.seconds) == {"scoring", "training"}
    scored = samples(store, "offline", "scoring")
    assert len(set(scored["sample_id"])) == 64
    assert {"prompt", "reward", "digit"} <= set(scored.columns)


class Rater(ToyPolicy):
    """Follows the trainer, and does not generate: all of its flow is scoring."""

    generates = False


@pytest.mark.slow
def test_a_followed_module_that_only_scores_is_not_moved_before_it_is_through(
    store: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    rater, reward = Rater("rater", log=log, slow_s=0.3), ToyReward("reward")
    trainer = ToyTrainer("trainer")

    def env_flow(batch: Any) -> Any:
        rated = rater.forward_step(batch)
        return rated, reward.forward_step(rated)

    engine = Engine(Environment(env_flow), Trainer(lambda b: trainer.train_step(b)), name="rated")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_parameter_sync(trainer, rater)
    learn(engine, store, "rated", num_episode=2, max_staleness=1)  # type: ignore[arg-type]
    # Back to version 0 it would only come in a new process.
    assert len(pids(log)) == 1


class Judge(ToyReward):
    """Takes its time with a version of the policy: until the next one has been through retention.

    Then it writes down whether the weights of the version that it judges are still there.
    """

    def __init__(self, name: str, *, run: Path) -> None:
        super().__init__(name)
        self.run = run

    def eval_step(self, data: Any) -> Any:
        version = int(data["sample_id"][0][1:7])
        if 0 < version < 3:
            deleted = self.run / f"deleted/checkpoints/version={version:06d}"
            deadline = time.monotonic() + 60
            while not deleted.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.3)  # weights would go next
            there = any((self.run / "weights").glob(f"version={version:06d}/*/*"))
            with (self.run / "judged").open("a") as file:
                file.write(f"{version} {there}\n")
        return self.forward_step(data)


@pytest.mark.slow
def test_weights_are_kept_until_their_version_is_evaluated(store: Path) -> None:
    policy, reward, trainer = ToyPolicy("policy"), ToyReward("reward"), ToyTrainer("trainer")
    judge = Judge("judge", run=store / "judged")

    def env_flow(batch: Any) -> Any:
        sampled = policy.forward_step(batch)
        return sampled, reward.forward_step(sampled)

    engine = Engine(
        Environment(env_flow),
        Trainer(lambda b: trainer.train_step(b)),
        Evaluator(lambda b: judge.eval_step(policy.eval_step(b))).set_dataset([{"prompt": "0"}]),
        name="judged",
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    engine.set_parameter_sync(trainer, policy)
    learn(engine, store, "judged", keep_last=1, eval_episode_interval=1)  # type: ignore[arg-type]
    assert (store / "judged/judged").read_text() == "1 True\n2 True\n"
    left = {path.parts[-3] for path in (store / "judged/weights").glob("version=*/*/*")}
    assert left == {"version=000003"}


class Hint(ToyReward):
    """A step before sampling, that passes nothing on but its own column."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        from tests.toys import Rows

        return Rows(prompts)

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return {"hint": [f"hint for {p}" for p in data["prompt"]]}


@pytest.mark.slow
def test_steps_before_and_beside_sampling_get_the_rows_they_take(store: Path) -> None:
    hint, policy, trainer = Hint("hint"), ToyPolicy("policy"), ToyTrainer("trainer")
    reward, early = ToyReward("reward"), Hint("early")

    def env_flow(batch: Any) -> Any:
        beside = early.forward_step(batch)  # called first, but scoring: nothing samples from it
        sampled = policy.forward_step(hint.forward_step(batch))
        return sampled, reward.forward_step(sampled), beside

    engine = Engine(Environment(env_flow), Trainer(lambda b: trainer.train_step(b)), name="hints")
    engine.set_dataset([{"prompt": str(i)} for i in range(8)])
    engine.set_parameter_sync(trainer, policy)
    learn(engine, store, "hints", num_episode=1)  # type: ignore[arg-type]
    rows = samples(store, "hints")
    assert list(rows["hint"]) == [f"hint for {p}" for p in rows["prompt"]]
    assert list(rows["prompt"]) == [str(r) for r in rows["prompt_row"]]


def test_an_engine_with_an_evaluator_alone_evaluates_once(store: Path) -> None:
    policy, reward = ToyPolicy("policy"), ToyReward("reward")

    def eval_flow(batch: Any) -> Any:
        sampled = policy.eval_step(batch)
        return sampled, reward.eval_step(sampled)

    rows = [{"prompt": str(i)} for i in range(16)]
    engine = Engine(evaluator=Evaluator(eval_flow).set_dataset(rows), name="look")
    result = learn(engine, store, "look")  # type: ignore[arg-type]
    assert list(result.evaluations) == [0]
    assert result.episodes == {}


# ---- what a user can get wrong ----------------------------------------------------------------


class Raising(ToyReward):
    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        if any(int(p) >= 8 for p in data["prompt"]):
            raise ZeroDivisionError("no such digit")
        return super().forward_step(data)


class ShortReward(ToyReward):
    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return {name: column[:-1] for name, column in super().forward_step(data).items()}


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (
            Raising("reward"),
            ShardError,
            ["reward.forward_step", "scoring of episode 0, shard", "samples e0", "no such digit"],
        ),
        (ShortReward("reward"), DataError, ["reward.forward_step", "shard", "7 rows for 8"]),
    ],
)
def test_user_code_that_fails_is_named_and_not_tried_again(
    store: Path, tmp_path: Path, reward: ToyReward, error: type[Exception], words: list[str]
) -> None:
    log = tmp_path / "log"
    from rlhf_flows.engines import GRPOEngine

    engine = GRPOEngine(ToyPolicy("policy", log=log), ToyTrainer("trainer"), reward, name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(16)])
    with pytest.raises(error) as raised:
        learn(engine, tmp_path, "raises")
    for word in words:
        assert word in str(raised.value)
    ids = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(ids) == len(set(ids)), "a sample was generated again"


def test_more_cpus_than_there_are_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ResourcesError, match=r"policy 5000 CPUs") as raised:
        learn(toy_engine(), tmp_path, "big", models={"policy": {"num_cpu": 5000}})
    assert "lower models.<name>.num_cpu" in str(raised.value)
    assert not (tmp_path / "big").exists()


def test_a_model_that_no_flow_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no flow calls a module of that name"):
        learn(toy_engine(), tmp_path, "x", models={"polcy": {"num_replica": 2}})


def test_another_configuration_under_an_old_name_is_refused_with_the_difference(
    plain: Any, store: Path
) -> None:
    with pytest.raises(RunConflictError) as raised:
        learn(toy_engine(), store, "plain", eval_episode_interval=1, seed=5)
    assert "runtime.seed" in str(raised.value)


def test_a_changed_dataset_is_refused_on_resume(plain: Any, store: Path) -> None:
    with pytest.raises(DataError, match="resume with the same prompts"):
        learn(toy_engine(rows=63), store, "plain", eval_episode_interval=1, num_episode=4)
