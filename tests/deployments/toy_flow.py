"""Flows that tests deploy: the toys, on a cluster that outlives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from rlhf_flows.config import EngineConfig
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


@flow(name="line", persist_result=False)
def line(config: dict[str, Any]) -> None:
    """Says that it began and that it ended, in a file of the store."""
    name = flow_run.get_name()
    for what in ("begins", "ends"):
        with (Path(config["store"]["url"]) / "order").open("a") as file:
            file.write(f"{name} {what}\n")


class DigitsConfig(EngineConfig):
    """A form like those of the recipes, of a run that takes seconds."""

    form_first = ("goal", "repair", "run_name", "runtime")

    goal: int = Field(
        ge=0, le=9, title="Digit to prefer", description="The digit that the reward likes best."
    )
    repair: str = Field(
        title="File of the repair",
        description="From the second episode on, the reward fails until this file exists.",
    )


class BrokenReward(ToyReward):
    """Fails after `num_good` samples while its file of the repair is not there."""

    def __init__(self, name: str, *, goal: int, repair: Path, num_good: int) -> None:
        super().__init__(name, goal=goal)
        self.repair, self.num_good, self.num_scored = repair, num_good, 0

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        self.num_scored += len(data["digit"])
        if self.num_scored > self.num_good and not self.repair.exists():
            raise ValueError(f"the reward is broken: make {self.repair.name}, and retry the run")
        return super().forward_step(data, iteration)


@flow(name="digits", persist_result=False)
async def digits(config: DigitsConfig) -> None:
    """A policy learns which digit its reward likes."""
    engine = GRPOEngine(
        ToyPolicy("policy"),
        ToyTrainer("trainer"),
        BrokenReward(
            "reward",
            goal=config.goal,
            repair=Path(config.repair),
            num_good=2 * config.runtime.sample_per_episode,
        ),
        name="digits",
    ).configure(config)
    engine.set_dataset([{"prompt": f"Say a digit, please ({i})."} for i in range(64)])
    await engine.alearn()
