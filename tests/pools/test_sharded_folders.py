"""Ranks that hold different parts write one checkpoint, which any number of ranks takes up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

from rlhf_flows.errors import RlhfFlowsError
from rlhf_flows.pools import Pool, joined
from rlhf_flows.pools.digest import digest_weights
from rlhf_flows.pools.messages import CheckpointRecord
from rlhf_flows.pools.worker import Worker
from tests.pools.halves import Halves
from tests.pools.specs import spec_of, train_call
from tests.pools.test_worker import episode_table, train_episode

pytestmark = pytest.mark.usefixtures("ray_head")

TIMEOUT_S = 60.0


class Ranks:
    """A pool of one replica, and the calls that are tested here."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def train(self, episode: int) -> None:
        for index in range(2):
            table = episode_table(10 * episode + index)
            await self.call("train", train_call(episode, index), table)

    async def checkpoint(self, version: int, *, with_state: bool = True) -> CheckpointRecord:
        record: CheckpointRecord = await self.call("checkpoint", 1, version, with_state)
        self.pool.tell(self.pool.replicas[0], "committed", version)
        return record

    async def call(self, method: str, *args: Any) -> Any:
        return await self.pool.call(method, *args, what=method, timeout_s=TIMEOUT_S)


@pytest.fixture
async def ranks(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    pools: list[Pool] = []

    async def start(module: Halves, *, ranks: int = 2, **spec: Any) -> Ranks:
        run = f"run-{uuid4().hex[:8]}"
        made = spec_of(module, tmp_path, run=run, ranks_per_replica=ranks, **spec)
        pools.append(Pool(spec=made, attempt=1, setup_timeout_s=60.0, max_restarts=0))
        await pools[-1].open()
        return Ranks(pools[-1])

    yield start
    for pool in pools:
        pool.release()


def alone(store: Path, **spec: Any) -> Worker:
    worker = Worker(spec_of(Halves("trainer"), store, **spec))
    worker.setup(1)
    return worker


def stored(store: Path, record: CheckpointRecord) -> dict[str, torch.Tensor]:
    assert record.weights is not None
    return load_file(store / record.weights.prefix / "model.safetensors")


@pytest.mark.slow
async def test_what_two_ranks_write_is_taken_up_by_two_and_by_one(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    averages = {"reference": 0.25}
    two = await ranks(Halves("trainer"), averages=averages)
    await two.train(0)
    first = await two.checkpoint(1)
    await two.train(1)
    second = await two.checkpoint(2)
    assert first.digest != second.digest
    assert digest_weights(stored(tmp_path, first).items()) == first.digest
    assert first.state is not None
    names = sorted(file.name for file in first.state.files)
    assert names == [
        "average-reference.safetensors",
        "module.json",
        *(f"state-0000{r}{rest}" for r in (0, 1)
          for rest in ("-00000.safetensors", "-00001.safetensors", ".json")),
    ]  # fmt: skip

    # One rank that never heard of another does the same from the start, and from the checkpoint.
    one = alone(tmp_path, averages=averages)
    train_episode(one, 0)
    assert one.checkpoint(1, 1, True).digests == first.digests
    other = alone(tmp_path, averages=averages)
    other.restore(1, first, 1)
    train_episode(other, 1)
    assert other.checkpoint(1, 2, False).digests == second.digests

    again = await ranks(Halves("trainer"), averages=averages)
    await again.call("restore", 1, first, 1)
    assert await again.call("weights_digests", 1) == first.digests
    await again.train(1)
    assert (await again.checkpoint(2)).digests == second.digests


async def test_ranks_train_on_while_what_they_wrote_is_uploaded(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    averages = {"reference": 0.25}
    one = alone(tmp_path, averages=averages)
    train_episode(one, 0)
    wanted = one.checkpoint(1, 1, True)
    two = await ranks(Halves("trainer"), averages=averages, works_beside=True)
    await two.train(0)
    await two.call("write_checkpoint", 1, 1, True)
    await two.train(1)
    (replica,) = two.pool.replicas
    upload = {"what": "the upload", "timeout_s": TIMEOUT_S}
    record = joined(await two.pool.beside(replica, "uploaded", 1, 1, **upload))
    assert record.digests == wanted.digests
    other = alone(tmp_path, averages=averages)
    other.restore(1, record, 1)
    train_episode(other, 1)
    assert other.weights_digests(1) == await two.call("weights_digests", 1)


async def test_two_ranks_take_up_what_one_wrote(ranks: Callable[..., Any], tmp_path: Path) -> None:
    one = alone(tmp_path)
    train_episode(one, 0)
    first = one.checkpoint(1, 1, True)
    one.committed(1, 1)
    train_episode(one, 1)
    two = await ranks(Halves("trainer"))
    await two.call("restore", 1, first, 1)
    await two.train(1)
    assert (await two.checkpoint(2)).digest == one.checkpoint(1, 2, True).digest


async def test_a_rank_that_fails_leaves_nobody_waiting(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    two = await ranks(Halves("trainer", fails=fails))
    await two.train(0)
    for what in ("save_state/1", "export_weights/0"):
        fails.write_text(what)
        with pytest.raises((RlhfFlowsError, OSError), match="a broken disk"):
            await two.checkpoint(1)
    fails.unlink()
    # Both ranks are where they were: the next call meets them in step.
    record = await two.checkpoint(1)
    one = alone(tmp_path)
    train_episode(one, 0)
    assert record.digest == one.checkpoint(1, 1, False).digest

    await two.train(1)
    fails.write_text("load_weights/1")
    with pytest.raises(RlhfFlowsError, match="a broken disk"):
        await two.call("restore", 1, record, 1)
    fails.unlink()
    await two.call("restore", 1, record, 1)
    assert (await two.checkpoint(1)).digest == record.digest
