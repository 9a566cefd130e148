"""A worker without Ray: what it refuses, what it stores, and that its state travels to the bit."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_flows.data import from_arrow, from_parquet, to_arrow
from rlhf_flows.errors import (
    DataError,
    FencedError,
    NotBegunError,
    PoolError,
    ShardDamageError,
    ShardError,
    SyncError,
)
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.pools.messages import ForwardCall, StoredShard, TrainRows
from rlhf_flows.pools.transport import pack
from rlhf_flows.pools.worker import Worker
from rlhf_flows.store import open_store, take_attempt
from tests.pools.specs import LAYOUT, ROWS, RUN, manifest_of, rollout_call, spec_of, train_call
from tests.toys import ToyPolicy, ToyReward, ToyTrainer


def worker_of(module: Any, store: Path, **changes: Any) -> Worker:
    worker = Worker(spec_of(module, store, **changes))
    worker.setup(1)
    return worker


@pytest.fixture
def policy(tmp_path: Path) -> Worker:
    worker = worker_of(ToyPolicy("policy"), tmp_path)
    assert worker.load_dataset(1, "train", "digest", ROWS) == (32,)
    return worker


@pytest.fixture
def trainer(tmp_path: Path) -> Worker:
    return worker_of(ToyTrainer("trainer"), tmp_path)


def episode_table(number: int) -> Any:
    """A shard of eight rows to train on."""
    generator = torch.Generator().manual_seed(number)
    digits = torch.randint(10, (8,), generator=generator)
    return to_arrow({"digit": digits, "reward": 1.0 - (digits - 7).abs() / 10})


def train_episode(worker: Worker, number: int, *, steps: int = 2) -> None:
    for index in range(steps):
        worker.train(train_call(number, index), episode_table(10 * number + index))


# ---- forward and commit -----------------------------------------------------------------------


def test_a_shard_holds_the_rows_the_plan_and_the_version_that_sampled_it(
    policy: Worker, tmp_path: Path
) -> None:
    table, source, report = policy.forward(rollout_call(0, 1))
    stored = from_parquet((tmp_path / report.key).read_bytes())
    assert report.rows == 8
    assert not report.adopted
    columns = rollout_call(0, 1).source.columns  # type: ignore[union-attr]
    assert stored["sample_id"] == columns["sample_id"]
    assert stored["prompt"] == [str(row) for row in columns["prompt_row"]]
    assert stored["policy_version"].tolist() == [0] * 8
    assert from_arrow(table)["completion"] == stored["completion"]
    assert source is None  # nobody else takes it


def test_the_same_shard_again_is_adopted_whatever_the_second_worker_made(
    policy: Worker, tmp_path: Path
) -> None:
    first, _, _ = policy.forward(rollout_call(0, 0))

    class Other(ToyPolicy):
        def forward_step(self, data: Any, iteration: int = 0) -> Any:
            return {**super().forward_step(data), "completion": ["x"] * 8}

    other = worker_of(Other("policy"), tmp_path)
    other.load_dataset(1, "train", "digest", ROWS)
    second, _, report = other.forward(rollout_call(0, 0))
    assert report.adopted
    assert from_arrow(second)["completion"] == from_arrow(first)["completion"]


def test_samples_are_the_same_on_every_worker_and_in_every_order(
    policy: Worker, tmp_path: Path
) -> None:
    there = [policy.forward(rollout_call(0, i))[0] for i in (0, 1)]
    other = Worker(spec_of(ToyPolicy("policy"), tmp_path / "other"), replica=5)
    other.setup(1)
    other.load_dataset(1, "train", "digest", ROWS)
    back = [other.forward(rollout_call(0, i))[0] for i in (1, 0)]
    assert there[0].equals(back[1])
    assert there[1].equals(back[0])


def test_scoring_stores_what_the_rollout_shard_does_not_hold(
    policy: Worker, tmp_path: Path
) -> None:
    table, _, rollout = policy.forward(rollout_call(0, 0))
    reward = worker_of(ToyReward("reward"), tmp_path)
    key = LAYOUT.shard("scoring", 0, 0)
    call = dataclasses.replace(
        rollout_call(0, 0), phase="scoring", inputs=(0,), base=0, source=None, version=None
    )
    call = dataclasses.replace(call, commit_key=key)
    from_memory, _, _ = reward.forward(call, table)
    assert set(from_parquet((tmp_path / key).read_bytes())) == {"sample_id", "reward", "exact"}
    assert set(from_arrow(from_memory)) == {"sample_id", "reward", "exact"}
    # The same from the store, where the object in memory is gone.
    (tmp_path / key).unlink()
    from_store, _, _ = reward.forward(call, StoredShard(key=rollout.key))
    assert set(from_parquet((tmp_path / key).read_bytes())) == {"sample_id", "reward", "exact"}
    assert from_arrow(from_store)["reward"].equal(from_arrow(from_memory)["reward"])


def test_a_smaller_batch_of_the_module_gives_the_same_shard(tmp_path: Path) -> None:
    tables = []
    for name, size in (("whole", None), ("parts", 3)):
        worker = worker_of(ToyPolicy("policy"), tmp_path / name)
        worker.load_dataset(1, "train", "digest", ROWS)
        call = dataclasses.replace(rollout_call(0, 0), batch_size=size)
        tables.append(worker.forward(call)[0])
    assert tables[0].equals(tables[1])


def test_a_sampler_at_another_version_refuses_the_shard(policy: Worker) -> None:
    with pytest.raises(PoolError, match=r"holds policy version 0, shard 1 .* asks for version 4"):
        policy.forward(rollout_call(4, 1, version=4))


# ---- samples that are left out ----------------------------------------------------------------


def scoring_call(samples: frozenset[str]) -> ForwardCall:
    return dataclasses.replace(
        rollout_call(0, 0),
        phase="scoring",
        inputs=(0,),
        base=0,
        source=None,
        version=None,
        samples=samples,
        commit_key=LAYOUT.shard("scoring", 0, 0),
    )


def test_a_part_of_a_shard_is_made_without_a_trace(policy: Worker, tmp_path: Path) -> None:
    table, _, _ = policy.forward(rollout_call(0, 0))
    (whole,) = tmp_path.rglob("*.parquet")
    ids = from_arrow(table)["sample_id"]
    reward = worker_of(ToyReward("reward"), tmp_path)
    call = dataclasses.replace(scoring_call(frozenset(ids[2:5])), commit_key=None, base=None)
    part, _, report = reward.forward(call, table)
    assert report.rows == 3
    assert from_arrow(part)["sample_id"] == ids[2:5]
    assert list(tmp_path.rglob("*.parquet")) == [whole]


def test_a_scored_shard_lacks_who_is_left_out_and_training_takes_the_rows_that_both_have(
    policy: Worker, tmp_path: Path
) -> None:
    sampled, _, _ = policy.forward(rollout_call(0, 0))
    batch = from_arrow(sampled)
    kept = batch["sample_id"][:2] + batch["sample_id"][4:]
    reward = worker_of(ToyReward("reward"), tmp_path)
    _, _, report = reward.forward(scoring_call(frozenset(kept)), sampled)
    stored = from_parquet((tmp_path / report.key).read_bytes())
    assert set(stored) == {"sample_id", "reward", "exact"}
    assert stored["sample_id"] == kept

    class Seeing(ToyTrainer):
        def train_step(self, data: Any, iteration: int) -> Any:
            self.__dict__.setdefault("seen", []).extend(data)
            return super().train_step(data, iteration)

    trainer = worker_of(Seeing("trainer"), tmp_path)
    # A row that was scored before its group was left out is not trained on either.
    call = train_call(
        0,
        0,
        rows=(TrainRows(shard=0, rows=(2, 3)), TrainRows(shard=0, rows=(0, 1))),
        shards=((0, 2),),
        left_out=frozenset(kept[2:4]),
        num_updates=1,
    )
    metrics = trainer.train(call, sampled, StoredShard(key=report.key))
    (seen,) = trainer._module.seen
    wanted = [*kept[4:6], *kept[0:2]]
    assert seen["sample_id"] == wanted
    digits = [int(batch["digit"][batch["sample_id"].index(name)]) for name in wanted]
    assert seen["digit"].tolist() == digits
    assert seen["reward"].tolist() == pytest.approx([1 - abs(d - 7) / 10 for d in digits])
    assert metrics["rows"] == 4


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_whose_groups_are_all_left_out_trains_nothing_and_counts(
    tmp_path: Path, whole: bool
) -> None:
    class Episodic(ToyTrainer):
        shown = 0

        def before_updates(self, batches: Any) -> Any:
            self.shown = len(batches)
            return batches

    worker = worker_of(Episodic("trainer"), tmp_path)
    rows = (TrainRows(shard=1, rows=tuple(range(8))),)
    episode_rows = ((), rows) if whole else None
    before = worker.weights_digests(1)
    shards = ((1, 1),) if whole else ()
    tables = [episode_table(1)]
    first = train_call(0, 0, rows=(), shards=shards, episode_rows=episode_rows)
    metrics = worker.train(first, *(tables if whole else ()))
    assert metrics["rows"] == 0
    assert "loss" not in metrics
    assert worker._module.shown == int(whole)
    worker.train(train_call(0, 1, shards=() if whole else ((1, 1),)), *([] if whole else tables))
    assert worker.weights_digests(1) != before
    worker.committed(1, 1)
    assert worker.state().clean


# ---- damage -----------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_across_processes_and_the_step_can_be_made_again(
    policy: Worker, trainer: Worker, tmp_path: Path
) -> None:
    _, _, report = policy.forward(rollout_call(0, 0))
    path = tmp_path / report.key
    sound = path.read_bytes()
    path.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
    call = train_call(0, 0, shards=((0, 1), (9, 1)))
    with pytest.raises(ShardDamageError, match="is damaged") as raised:
        trainer.train(call, episode_table(0), StoredShard(key=report.key))
    again = pickle.loads(pickle.dumps(raised.value))
    assert (again.key, str(again)) == (report.key, str(raised.value))
    assert (trainer.state().clean, trainer.state().version) == (True, 0)
    path.write_bytes(sound)
    trainer.train(call, episode_table(0), StoredShard(key=report.key))
    # In the middle of an episode, too.
    path.write_bytes(sound[:-1])
    step = train_call(0, 1, shards=((1, 1), (8, 1)))
    with pytest.raises(ShardDamageError):
        trainer.train(step, episode_table(1), StoredShard(key=report.key))
    path.write_bytes(sound)
    trainer.train(step, episode_table(1), StoredShard(key=report.key))


# ---- the fence --------------------------------------------------------------------------------


def test_calls_of_an_older_attempt_are_refused(policy: Worker) -> None:
    assert policy.attach(3).ready
    with pytest.raises(FencedError, match="attempt 2 of run 'run' was taken over by attempt 3"):
        policy.forward(rollout_call(0, 0, attempt=2))
    policy.forward(rollout_call(0, 0, attempt=3))


def test_a_new_process_asks_the_store_which_attempt_rules(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for _ in range(2):
        take_attempt(store, RUN, flow_run_id=None, changed={})
    with pytest.raises(FencedError, match="attempt 1 of run 'run' was replaced by attempt 2"):
        Worker(spec_of(ToyReward("reward"), tmp_path)).setup(1)
    assert Worker(spec_of(ToyReward("reward"), tmp_path)).setup(2).ready


# ---- user code --------------------------------------------------------------------------------


class Broken(ToyPolicy):
    def __init__(self, name: str, what: str) -> None:
        super().__init__(name)
        self.what = what

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        match self.what:
            case "raises":
                raise KeyError("digit")
            case "no dict":
                return [1, 2]
            case "rows":
                return {"x": torch.zeros(3)}
            case "tuple":
                return {"x": [(1, 2)] * 8}
            case "refuses":
                raise DataError("row 3 has no answer")
        raise AssertionError


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("raises", ShardError, "KeyError: 'digit'"),
        ("no dict", DataError, "it returned a list, expected a dict of columns"),
        ("rows", DataError, "it returned 3 rows for 8: return one row for each sample"),
        ("refuses", DataError, "row 3 has no answer"),
    ],
)
def test_what_user_code_gets_wrong_names_module_method_shard_and_samples(
    tmp_path: Path, what: str, error: type[Exception], text: str
) -> None:
    worker = worker_of(Broken("policy", what), tmp_path)
    worker.load_dataset(1, "train", "digest", ROWS)
    ids = rollout_call(2, 1).source.columns["sample_id"]  # type: ignore[union-attr]
    where = f"policy.forward_step failed on rollout of episode 2, shard 1 (samples {ids[0]} to"
    with pytest.raises(error) as raised:
        worker.forward(rollout_call(2, 1))
    assert str(raised.value).startswith(where)
    assert text in str(raised.value)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_column_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    worker = worker_of(Broken("policy", "tuple"), tmp_path)
    worker.load_dataset(1, "train", "digest", ROWS)
    with pytest.raises(
        DataError, match=r"policy.forward_step failed .* shard 0: column 'x', row 0"
    ):
        worker.forward(rollout_call(0, 0))


def test_a_failed_training_step_is_named(trainer: Worker) -> None:
    with pytest.raises(ShardError, match=r"trainer.train_step failed on training of episode 0, st"):
        trainer.train(train_call(0, 0), to_arrow({"digit": torch.zeros(8)}))


# ---- training ---------------------------------------------------------------------------------


def test_steps_come_in_order_and_only_from_a_clean_version(trainer: Worker) -> None:
    table = episode_table(0)
    with pytest.raises(PoolError, match="asked for step 1 of episode 0, but it is elsewhere"):
        trainer.train(train_call(0, 1), table)
    with pytest.raises(PoolError, match="to train version 2, but it is at version 0"):
        trainer.train(train_call(2, 0), table)
    trainer.train(train_call(0, 0), table)
    with pytest.raises(PoolError, match="in the middle of leaving version 0"):
        trainer.train(train_call(0, 0), table)
    trainer.train(train_call(0, 1), table)
    assert not trainer.state().clean
    trainer.committed(1, 1)
    assert (trainer.state().version, trainer.state().clean) == (1, True)


def test_a_batch_is_the_rows_that_the_plan_names_in_its_order(tmp_path: Path) -> None:
    class Seeing(ToyTrainer):
        seen: list[Any]

        def train_step(self, data: Any, iteration: int) -> Any:
            self.__dict__.setdefault("seen", []).extend(d["digit"].tolist() for d in data)
            return super().train_step(data, iteration)

    worker = worker_of(Seeing("trainer"), tmp_path)
    tables = [
        to_arrow({"digit": torch.arange(8) + 0 * i, "reward": torch.ones(8) * i}) for i in range(2)
    ]
    rows = (TrainRows(shard=1, rows=(4, 5)), TrainRows(shard=0, rows=(0, 1)))
    worker.train(train_call(0, 0, rows=rows, shards=((0, 1), (1, 1)), num_updates=1), *tables)
    assert worker._module.seen == [[4, 5, 0, 1]]


def test_restored_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight = worker_of(ToyTrainer("trainer"), tmp_path)
    train_episode(straight, 0)
    record = straight.checkpoint(1, 1, True)
    straight.committed(1, 1)
    train_episode(straight, 1)

    resumed = worker_of(ToyTrainer("trainer"), tmp_path)
    resumed.restore(1, record, 1)
    assert resumed.weights_digests(1) == record.digests
    train_episode(resumed, 1)
    assert resumed.weights_digests(1) == straight.weights_digests(1)


def test_weights_without_training_state_are_not_enough_to_go_on(tmp_path: Path) -> None:
    straight = worker_of(ToyTrainer("trainer"), tmp_path)
    train_episode(straight, 0)
    record = straight.checkpoint(1, 1, False)
    assert record.state is None
    straight.committed(1, 1)
    train_episode(straight, 1)
    bare = worker_of(ToyTrainer("trainer"), tmp_path)
    bare.restore(1, record, 1)
    train_episode(bare, 1)
    assert bare.weights_digests(1) != straight.weights_digests(1), "Adam's moments matter"


def test_a_restored_trainer_forgets_the_episode_it_was_in(trainer: Worker) -> None:
    train_episode(trainer, 0)
    record = trainer.checkpoint(1, 1, True)
    trainer.committed(1, 1)
    train_episode(trainer, 1, steps=1)
    trainer.restore(1, record, 1)
    assert trainer.weights_digests(1) == record.digests
    train_episode(trainer, 1)


def test_what_was_written_is_uploaded_whatever_is_trained_meanwhile(tmp_path: Path) -> None:
    straight = worker_of(ToyTrainer("trainer"), tmp_path)
    train_episode(straight, 0)
    first = straight.checkpoint(1, 1, True)
    straight.committed(1, 1)
    train_episode(straight, 1)

    ahead = worker_of(ToyTrainer("trainer"), tmp_path)
    train_episode(ahead, 0)
    ahead.write_checkpoint(1, 1, True)
    train_episode(ahead, 1)
    record = ahead.uploaded(1, 1)
    assert record.digests == first.digests
    assert ahead.weights_digests(1) == straight.weights_digests(1) != record.digests
    restored = worker_of(ToyTrainer("trainer"), tmp_path)
    restored.restore(1, record, 1)
    train_episode(restored, 1)
    assert restored.weights_digests(1) == straight.weights_digests(1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "files are left"


def test_training_goes_on_from_a_written_version_alone(trainer: Worker) -> None:
    train_episode(trainer, 0)
    with pytest.raises(PoolError, match="in the middle of leaving version 0"):
        trainer.train(train_call(1, 0), episode_table(0))
    trainer.write_checkpoint(1, 1, True)
    with pytest.raises(PoolError, match="is to train version 2"):
        trainer.train(train_call(2, 0), episode_table(0))
    trainer.train(train_call(1, 0), episode_table(0))
    # Who trains on is not clean, whatever is committed meanwhile.
    trainer.committed(1, 1)
    assert not trainer.state().clean
    trainer.train(train_call(1, 1), episode_table(1))
    trainer.committed(1, 2)
    assert (trainer.state().version, trainer.state().clean) == (2, True)


def test_a_process_that_never_was_at_a_version_is_not_told_into_it(trainer: Worker) -> None:
    trainer.committed(1, 3)
    assert (trainer.state().version, trainer.state().clean) == (0, True)
    train_episode(trainer, 0)
    trainer.attach(2)  # whether the attempt before came to commit it, the next one cannot know
    trainer.committed(2, 1)
    assert not trainer.state().clean


def test_one_checkpoint_is_on_its_way_at_most(trainer: Worker, tmp_path: Path) -> None:
    with pytest.raises(NotBegunError, match="has no files of version 1"):
        trainer.uploaded(1, 1)
    train_episode(trainer, 0)
    trainer.write_checkpoint(1, 1, True)
    trainer.write_checkpoint(1, 2, True)
    record = trainer.uploaded(1, 2)
    assert record.weights is not None
    assert record.weights.prefix.startswith(f"{RUN}/weights/version=000002/")
    with pytest.raises(NotBegunError, match="has no files of version 2"):
        trainer.uploaded(1, 2)
    for _ in range(100):
        if not (left := [path for path in tmp_path.iterdir() if path.name.startswith(".")]):
            break
        time.sleep(0.05)
    assert not left


def test_a_checkpoint_of_a_second_rank_writes_nothing(tmp_path: Path) -> None:
    worker = Worker(spec_of(ToyTrainer("trainer"), tmp_path), rank=1)
    worker.setup(1)
    assert worker.checkpoint(1, 1, True).weights is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_damaged_weights_are_not_loaded(trainer: Worker, tmp_path: Path) -> None:
    train_episode(trainer, 0)
    record = trainer.checkpoint(1, 1, True)
    (path,) = (p for p in tmp_path.rglob("model.safetensors") if "weights" in str(p))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = trainer.weights_digests(1)
    with pytest.raises(Exception, match=r"model\.safetensors"):
        trainer.restore(1, record, 1)
    assert trainer.weights_digests(1) == before
    assert not trainer.state().clean


def test_a_failed_load_of_weights_leaves_no_version(tmp_path: Path) -> None:
    class Failing(ToyPolicy):
        def load_weights(self, weights: Any) -> None:
            raise ValueError("no")

    worker = worker_of(Failing("policy"), tmp_path)
    weights = {"preferences": torch.arange(10.0)}
    (bucket,) = pack(weights.items(), manifest_of(weights, 7, 1 << 20))
    with pytest.raises(SyncError, match=r"failed to load version 7 \(ValueError: no\)"):
        worker.receive_bucket(1, bucket)
    assert (worker.state().version, worker.state().clean) == (-1, False)


def test_buckets_come_from_the_first_on_or_begin_again(tmp_path: Path) -> None:
    class Wide(ToyPolicy):
        def setup(self) -> None:
            super().setup()
            self.model.more = torch.nn.Parameter(torch.zeros(3))

    worker = worker_of(Wide("policy"), tmp_path)
    weights = {"preferences": torch.arange(10.0), "more": torch.ones(3)}
    first, second = pack(weights.items(), manifest_of(weights, 7, 40))
    with pytest.raises(SyncError, match="was given bucket 1 of some weights, expected was the fir"):
        worker.receive_bucket(1, second)
    for _ in range(2):  # the second time in the middle of the first
        assert worker.receive_bucket(1, first).version == -1
    with pytest.raises(PoolError, match="holds policy version -1"):
        worker.forward(rollout_call(0, 0))
    assert worker.receive_bucket(1, second).version == 7
    assert worker.weights_digests(1) == {"": digest_weights(weights.items())}
    other = {"preferences": torch.arange(9.0), "more": torch.ones(3)}
    first, _ = pack(other.items(), manifest_of(other, 8, 36))
    with pytest.raises(SyncError, match=r"preferences is float32 .9., expected float32 .10."):
        worker.receive_bucket(1, first)
    assert worker.weights_digests(1) == {"": digest_weights(weights.items())}


def test_a_trainer_whose_weights_are_not_the_committed_ones_sends_nothing(
    trainer: Worker,
) -> None:
    with pytest.raises(SyncError, match=r"'trainer' holds weights with digest .*, committed was"):
        next(trainer.stream_weights(1, 0, 1 << 20, "", "abcd"))
    # It has moved on.
    assert list(trainer.stream_weights(1, 5, 1 << 20, "", "abcd")) == [[0], [0]]


def test_datasets_are_known_by_their_digest(policy: Worker) -> None:
    assert policy.state().datasets == (("train", "digest", (32,)),)
    policy.load_dataset(1, "train", "another", ROWS[:3])
    assert policy.state().datasets == (("train", "another", (3,)),)


def test_options_and_iteration_reach_the_method(tmp_path: Path) -> None:
    class Judge(ToyReward):
        def judge(self, data: Any, iteration: int = -1, *, strict: bool = False) -> Any:
            return {"seen": [[iteration, strict]] * len(data["sample_id"])}

    worker = worker_of(Judge("judge"), tmp_path)
    call = ForwardCall(
        attempt=1,
        phase="scoring",
        episode=4,
        shard=0,
        method="judge",
        options={"strict": True},
        inputs=(0,),
    )
    table, _, report = worker.forward(call, to_arrow({"sample_id": ["a", "b"]}))
    assert from_arrow(table)["seen"] == [[4, True]] * 2
    assert report.key == ""


def test_a_worker_that_is_no_actor_does_not_end_its_process(tmp_path: Path) -> None:
    """Its lease is over after a tenth of a second; an actor's process would end with it."""
    code = f"""
import sys, time
from pathlib import Path
from rlhf_flows.pools.worker import Worker
from tests.pools.specs import spec_of
from tests.toys import ToyPolicy

Worker(spec_of(ToyPolicy("policy"), Path({str(tmp_path)!r}), lease_s=0.1), is_leased={{leased}})
time.sleep(1.0)
sys.exit(7)
"""
    for leased, status in ((False, 7), (True, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(leased=leased)], check=False, timeout=60
        )
        assert done.returncode == status
