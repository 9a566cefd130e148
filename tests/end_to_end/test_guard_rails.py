"""Runs that a guard rail stops: the reason and the last good checkpoint are named, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.engines import GRPOEngine
from rlhf_flows.errors import GuardRailError, NonFiniteError
from rlhf_flows.exports import exported_model
from tests.end_to_end.whole_run import assert_same_bits, commits, learn, toy_engine
from tests.incidents import Incidents
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("services")]

EPISODES = 4


def test_a_rail_stops_a_run_and_each_resume_of_it_until_it_is_changed(
    services: str, tmp_path: Path
) -> None:
    learn(toy_engine(eval_rows=0), tmp_path, "free", address=services, num_episode=EPISODES)
    rail = {"metrics": [{"metric": "reward", "below": 2.0, "for_episodes": 3}]}
    for attempt in range(2):
        heard = Incidents()
        with pytest.raises(GuardRailError) as caught:
            learn(
                toy_engine(eval_rows=0),
                tmp_path,
                "guarded",
                address=services,
                progress=heard,
                num_episode=EPISODES,
                stop_if=rail,
            )
        message = str(caught.value)
        assert "stopped after episode 2 by its guard rail runtime.stop_if.metrics" in message
        assert "reward is below 2 (episode 0: reward" in message
        assert "run_name=guarded and another runtime.stop_if.metrics" in message
        assert [kind for kind, _ in heard.told] == ["guard-rail"], attempt
        _, facts = heard.told[0]
        assert (facts["first_bad_episode"], facts["version"]) == (0, 3)
        assert facts["values"] == {"reward": commits(tmp_path, "guarded")[-1]["metrics"]["reward"]}
        assert len(commits(tmp_path, "guarded")) == 3
    learn(toy_engine(eval_rows=0), tmp_path, "guarded", address=services, num_episode=EPISODES)
    assert_same_bits(tmp_path, "guarded", reference="free")


class FallsAt(ToyReward):
    """Likes nothing from episode 3 on; the ids of samples begin with their episode."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        found = super().forward_step(data, iteration)
        if int(data["sample_id"][0][1:7]) >= 3:
            found["reward"] = found["reward"] - 5.0
        return found


def test_the_last_good_checkpoint_is_kept_and_can_be_taken_out(
    services: str, tmp_path: Path
) -> None:
    engine = GRPOEngine(ToyPolicy("policy"), ToyTrainer("trainer"), FallsAt("reward"), name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    heard = Incidents()
    with pytest.raises(GuardRailError, match="The last good checkpoint is version 2: `rlhf-flows"):
        learn(
            engine,
            tmp_path,
            "fell",
            address=services,
            progress=heard,
            num_episode=8,
            keep_last=1,
            stop_if={"reward_below": 0.0, "for_episodes": 3},
        )
    # Episode 3 was sampled from version 3, so version 2 is the newest that did well.
    assert len(commits(tmp_path, "fell")) == 6
    assert heard.told[-1][1]["last_good_version"] == 2
    assert exported_model(str(tmp_path), "fell", version=2).is_dir()


class NaNAt(ToyTrainer):
    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        found = dict(super().train_step(data, iteration))
        return {**found, "loss": float("nan")} if iteration == 2 else found


def test_a_loss_that_is_no_number_tells_of_the_last_good_checkpoint(
    services: str, tmp_path: Path
) -> None:
    engine = GRPOEngine(ToyPolicy("policy"), NaNAt("trainer"), ToyReward("reward"), name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    heard = Incidents()
    with pytest.raises(NonFiniteError, match=r"'loss' is nan.* checkpoint is version 1: .*dies@1 "):
        learn(engine, tmp_path, "dies", address=services, progress=heard)
    assert [kind for kind, _ in heard.told] == ["guard-rail"]
    assert heard.told[0][1]["setting"] == "runtime.stop_if.nan"
    assert len(commits(tmp_path, "dies")) == 1
