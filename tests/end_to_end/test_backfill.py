"""Versions of a run that are evaluated afterwards, by somebody else, into that run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engines import EvalEngine
from rlhf_flows.errors import ConfigError
from rlhf_flows.flow import RunResult
from rlhf_flows.store import delete_folder, open_store, read_json, scan
from rlhf_flows.store.checkpoints import FolderRecord
from rlhf_flows.store.layout import RunLayout
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.progress import NoProgress
from tests.end_to_end.whole_run import (
    RUNTIME,
    assert_exactly_once,
    evaluated_versions,
    learn,
    shard_digests,
    toy_engine,
)
from tests.toys import ToyPolicy, ToyReward

pytestmark = [pytest.mark.usefixtures("services"), pytest.mark.timeout(300)]

KEPT = {"keep_last": 9}


def backfill(
    store: Path, run: str, versions: Sequence[int], *, log: Path | None = None, **more: Any
) -> RunResult:
    engine = EvalEngine([ToyPolicy("policy", log=log), ToyReward("reward")], name="backfill")
    engine.set_dataset([{"prompt": f"eval {i}"} for i in range(16)])
    engine.set_backfill(Backfill(run=run, versions=tuple(versions), module="trainer", **more))
    return engine.learn(store={"url": str(store)}, runtime=RUNTIME)


def evaluations(store: Path, run: str) -> dict[str, str]:
    return {k: v for k, v in shard_digests(store, run).items() if k.startswith("evaluations/")}


def done_files(store: Path, run: str) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in (store / run).glob("evaluations/*/*/done.json")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, services: str) -> Path:
    """With a run "whole" that evaluates every version, and the same without most of these."""
    folder = tmp_path_factory.mktemp("backfill")
    learn(toy_engine(), folder, "whole", eval_episode_interval=1, **KEPT)
    learn(toy_engine(), folder, "ends", **KEPT)
    return folder


def test_a_version_evaluated_afterwards_gives_bit_for_bit_what_it_would_have_given_at_its_time(
    store: Path,
) -> None:
    assert evaluated_versions(store, "ends") == [0, 3]
    before = done_files(store, "ends")
    result = backfill(store, "ends", range(4))
    assert evaluations(store, "ends") == evaluations(store, "whole")
    assert evaluated_versions(store, "ends") == [0, 1, 2, 3]
    assert sorted(result.evaluations) == [0, 1, 2, 3]
    # What was there was read, and nobody took an attempt of that run.
    assert {p: data for p, data in done_files(store, "ends").items() if p in before} == before
    assert scan(open_store(str(store)), "ends").attempts == (1,)


def test_what_is_missing_is_done_and_nothing_else(store: Path, tmp_path: Path) -> None:
    backfill(store, "ends", range(4))
    whole = evaluations(store, "ends")
    version = next((store / "ends/evaluations/version=000002").iterdir())
    (version / "done.json").unlink()
    (version / "shard-00001.parquet").unlink()
    log = tmp_path / "calls"
    again = backfill(store, "ends", range(4), log=log)
    assert evaluations(store, "ends") == whole
    sampled = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(sampled) == 8  # one shard
    assert all(name.startswith("v000002") for name in sampled)
    assert sorted(again.evaluations) == [0, 1, 2, 3]
    log.write_text("")
    backfill(store, "ends", range(4), log=log)
    assert log.read_text() == ""  # no actor was started


def test_another_way_of_sampling_is_another_evaluation(store: Path) -> None:
    backfill(store, "whole", [1], settings={"temperature": 0.5})
    backfill(store, "whole", [1], settings={"temperature": 0.5})
    assert sorted(evaluated_versions(store, "whole")) == [0, 1, 1, 2, 3]


@pytest.mark.slow  # a run of its own
def test_versions_that_retention_deleted_are_left_out_and_named(tmp_path: Path) -> None:
    learn(toy_engine(), tmp_path, "short", **KEPT)
    opened, layout = open_store(str(tmp_path)), RunLayout("short")
    for version in (1, 2):
        commit = read_json(opened, layout.trained(version - 1))
        record = FolderRecord.from_json(commit["checkpoints"]["trainer"]["weights"])
        delete_folder(opened, layout, record, "a test")
    result = backfill(tmp_path, "short", [1, 2, 3])
    assert result.left_out == (1, 2)
    assert sorted(result.evaluations) == [3]
    with pytest.raises(ConfigError, match=r"weights of every version .*keep_last"):
        backfill(tmp_path, "short", [1, 2])


@pytest.mark.long  # two runs side by side
def test_beside_a_living_attempt_both_come_to_their_end(services: str, tmp_path: Path) -> None:
    results: list[RunResult] = []
    first = threading.Event()

    class Watched(NoProgress):
        """A progress that says when the first version is there."""

        def finished(self, phase: str, number: int, *_: Any) -> None:
            if phase == "training":
                first.set()

    def train() -> None:
        engine = toy_engine(slow_s=0.2)
        results.append(learn(engine, tmp_path, "alive", num_episode=4, progress=Watched(), **KEPT))

    living = threading.Thread(target=train)
    living.start()
    try:
        assert first.wait(120)
        found = backfill(tmp_path, "alive", [0, 1])
        assert sorted(found.evaluations) == [0, 1]
    finally:
        living.join(180)
    assert results[0].version == 4
    assert evaluated_versions(tmp_path, "alive") == [0, 1, 4]
    assert scan(open_store(str(tmp_path)), "alive").attempts == (1,)
    assert_exactly_once(tmp_path, "alive", episodes=4)
