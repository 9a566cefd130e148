"""Flows that tests deploy: the toys, on a cluster that outlives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from rlhf_flows.engines import GRPOEngine
from tests.toys import ToyPolicy, ToyReward, ToyTrainer


@flow(name="nested", persist_result=False)
async def nested(
    store: str, log: str, slow_s: float, cluster: dict[str, Any], runtime: dict[str, Any]
) -> None:
    """A flow of one's own that calls a deployed one as a subflow."""
    await toy(store, log, slow_s, cluster, runtime)


@flow(name="toy", persist_result=False)
async def toy(
    store: str, log: str, slow_s: float, cluster: dict[str, Any], runtime: dict[str, Any]
) -> None:
    """GRPO of digits, a shard in `slow_s` seconds."""
    engine = GRPOEngine(
        ToyPolicy("policy", log=Path(log), slow_s=slow_s),
        ToyTrainer("trainer"),
        ToyReward("reward"),
        name="toy",
    )
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    await engine.alearn(store={"url": store}, cluster=cluster, runtime=runtime)
