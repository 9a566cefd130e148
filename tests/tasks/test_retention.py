"""Which weights and training states retention leaves, and which it comes back for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import StoreError
from rlhf_flows.pools import CheckpointRecord
from rlhf_flows.store import ObjectStore, RunLayout, commit_json, open_store, scan, upload_folder
from rlhf_flows.tasks.retention import retain
from rlhf_flows.tasks.runtime import Runtime

LAYOUT = RunLayout("r")


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """Five versions with full state, and a reward that rises and falls."""
    store = open_store(tmp_path / "store")
    local = tmp_path / "folder"
    local.mkdir()
    (local / "model").write_bytes(b"m")
    for version in range(1, 6):
        record = CheckpointRecord(
            module="trainer",
            digest="",
            weights=upload_folder(store, LAYOUT.weights_prefix(version, "w"), local),
            state=upload_folder(store, LAYOUT.checkpoint_prefix(version, "s"), local),
            probe=None,
            seconds=0.0,
        )
        metrics = {"reward": [0.1, 0.9, 0.5, 0.7, 0.2][version - 1]}
        payload = {"checkpoints": {"trainer": record.to_json()}, "metrics": metrics}
        commit_json(store, LAYOUT.trained(version - 1), payload)
    return store


def runtime_of(store: ObjectStore, **settings: Any) -> Runtime:
    """What retention needs of an attempt that has just begun."""
    nothing: Any = {"environment": None, "trainer": None, "evaluator": None}
    nobody: Any = {"rollout_nodes": frozenset(), "scoring_nodes": frozenset(), "syncs": ()}
    return Runtime(
        config=EngineConfig(runtime={"num_episode": 9, **settings}),  # type: ignore[arg-type]
        run="r",
        attempt=1,
        store=store,
        state=scan(store, "r"),
        pools={},
        dataset=None,
        eval_dataset=None,
        **nothing,
        **nobody,
    )


def left(store: ObjectStore, kind: str) -> list[int]:
    """The versions that have a folder."""
    return sorted({int(info.key.split("=")[1][:6]) for info in store.list(f"r/{kind}")})


def test_the_newest_are_kept_and_what_a_plan_may_name(store: ObjectStore) -> None:
    asyncio.run(retain(runtime_of(store, keep_last=1, max_staleness=2), newest=4))
    assert left(store, "weights") == [2, 3, 4, 5]
    assert left(store, "checkpoints") == [4, 5]


def test_a_version_to_be_evaluated_is_kept_until_it_is(store: ObjectStore) -> None:
    asyncio.run(retain(runtime_of(store, keep_last=1), newest=4, needed={2}))
    assert left(store, "weights") == [2, 4, 5]
    assert left(store, "checkpoints") == [4, 5]
    # Also by an attempt that knows of it by the listing alone, across the gap above it.
    asyncio.run(retain(runtime_of(store, keep_last=1), newest=5))
    assert left(store, "weights") == left(store, "checkpoints") == [5]


def test_milestones_are_kept_with_their_state(store: ObjectStore) -> None:
    for newest in (3, 4, 5):
        asyncio.run(retain(runtime_of(store, keep_last=1, keep_every=2), newest=newest))
    assert left(store, "weights") == left(store, "checkpoints") == [2, 4, 5]
    # Settings may change: what is no milestone any more goes.
    asyncio.run(retain(runtime_of(store, keep_last=1, keep_every=4), newest=5))
    assert left(store, "weights") == left(store, "checkpoints") == [4, 5]


@pytest.mark.parametrize(
    ("best_is", "after_each"),
    [("highest", [[2, 3], [2, 4], [2, 4, 5]]), ("lowest", [[1, 3], [1, 3, 4], [1, 5]])],
)
def test_the_best_are_kept_until_better_ones_come(
    store: ObjectStore, best_is: str, after_each: list[list[int]]
) -> None:
    settings: dict[str, Any] = {"keep_last": 1, "keep_best": 2, "keep_best_is": best_is}
    runtime = runtime_of(store, **settings)
    for newest, expected in zip((3, 4, 5), after_each, strict=True):
        asyncio.run(retain(runtime, newest=newest))
        for kind in ("weights", "checkpoints"):
            assert [v for v in left(store, kind) if v <= newest] == expected
    # An attempt that knows of all that by the listing alone leaves the same.
    asyncio.run(retain(runtime_of(store, **settings), newest=5))
    assert left(store, "weights") == after_each[-1]


def test_where_a_run_evaluates_the_best_are_those_of_its_evaluations(store: ObjectStore) -> None:
    runtime = runtime_of(store, keep_last=1, keep_best=1)
    # Version 2, whose training saw the best reward, is not evaluated yet, and 4 never is.
    evaluations: dict[int, dict[str, float]] = {1: {"reward": 0.3}, 3: {"reward": 0.2}}
    asyncio.run(retain(runtime, newest=4, needed={2}, evaluations=evaluations))
    assert left(store, "weights") == [1, 2, 4, 5]
    asyncio.run(retain(runtime, newest=5, evaluations={**evaluations, 2: {"reward": 0.4}}))
    assert left(store, "weights") == [2, 5]


def test_a_metric_that_no_version_has_is_named(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(
        retain(runtime_of(store, keep_last=1, keep_best=1, keep_best_metric="rewad"), newest=5)
    )
    assert left(store, "weights") == [5]
    assert "'rewad', which no version has" in caplog.text
    assert "known are reward" in caplog.text


def test_whoever_is_killed_amid_deleting_leaves_it_to_the_next(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, times = store.put_if_absent, iter(range(3))

    def killed(key: str, data: bytes) -> bool:
        if next(times, None) is None:
            raise StoreError("killed")
        return put(key, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_if_absent", killed)
        with pytest.raises(StoreError, match="killed"):
            asyncio.run(retain(runtime_of(store, keep_last=1), newest=5))
    assert len(left(store, "weights")) > 2
    asyncio.run(retain(runtime_of(store, keep_last=1), newest=5))
    assert left(store, "weights") == left(store, "checkpoints") == [5]
