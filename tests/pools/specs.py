"""Pools of toys for the tests of this room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
from torch import Tensor

from rlhf_flows.data.plan import EpisodePlan, make_plan
from rlhf_flows.modules.base import BaseModule, ModuleContext
from rlhf_flows.pools.digest import DigestedTensor, digest_weights
from rlhf_flows.pools.messages import ForwardCall, PoolSpec, Source, TrainCall, TrainRows
from rlhf_flows.pools.transport import Manifest, cut
from rlhf_flows.store import RunLayout

RUN = "run"
LAYOUT = RunLayout(RUN)
ROWS = [{"prompt": str(i)} for i in range(32)]


def spec_of(module: BaseModule, store: Path, **changes: Any) -> PoolSpec:
    values = {
        "run": RUN,
        "module": cloudpickle.dumps(module),
        "module_name": module.name,
        "store_url": str(store),
        "context": ModuleContext(seed=3),
        "digest": "the same making",
        "store_retry_budget_s": 0.0,  # it comes on top of every timeout
    }
    return PoolSpec(**(values | changes))


def plan_of(episode: int, *, versions: dict[str, int] | None = None) -> EpisodePlan:
    """Two shards of eight samples, four to a prompt."""
    return make_plan(
        run_seed=3,
        episode=episode,
        num_rows=len(ROWS),
        dataset_digest="digest",
        sample_per_episode=16,
        group_size=4,
        groups_per_shard=2,
        shuffle=True,
        versions=versions or {},
    )


def rollout_call(episode: int, shard: int, *, attempt: int = 1, version: int = 0) -> ForwardCall:
    return ForwardCall(
        attempt=attempt,
        phase="rollout",
        episode=episode,
        shard=shard,
        method="forward_step",
        inputs=(-1,),
        source=Source(dataset="train", columns=plan_of(episode).samples(shard)),
        version=version,
        commit_key=LAYOUT.shard("rollout", episode, shard),
    )


def train_call(episode: int, index: int, **changes: Any) -> TrainCall:
    """Two steps an episode; step i takes shard i."""
    values: dict[str, Any] = {
        "attempt": 1,
        "episode": episode,
        "version": episode,
        "index": index,
        "iteration": 2 * episode + index,
        "num_updates": 2,
        "method": "train_step",
        "rows": (TrainRows(shard=index, rows=tuple(range(8))),),
        "shards": ((index, 1),),
    }
    return TrainCall(**(values | changes))


def manifest_of(weights: Mapping[str, Tensor], version: int, bucket_bytes: int) -> Manifest:
    each: list[DigestedTensor] = []
    digest = digest_weights(weights.items(), each)
    buckets = cut(each, bucket_bytes)
    return Manifest(version=version, digest=digest, tensors=tuple(each), buckets=buckets)
