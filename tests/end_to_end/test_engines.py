"""Each engine of known shape in a whole run, with modules of one's own: the toys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_flows import (
    BaseModule,
    DPOEngine,
    EvalEngine,
    OnlineDPOEngine,
    RewardModelEngine,
    RLHFEngine,
    TorchModule,
)
from rlhf_flows.data import pair_rows
from rlhf_flows.errors import ConfigError
from tests.end_to_end.whole_run import RUNTIME, commits, learn, samples
from tests.toys import DIGITS, Digits, Rows, ToyPolicy, ToyReward, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")

ROWS = [{"prompt": str(i)} for i in range(64)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def firsts(column: Any) -> Tensor:
    return torch.stack([row[0] for row in column])


class TersePolicy(ToyPolicy):
    """Returns its new columns alone."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        found = super().forward_step(data)
        return {name: found[name] for name in found if name not in data}


class ToyReference(BaseModule):
    """Thinks all digits equally likely; returns its new columns alone."""

    default_threads = 1

    def setup(self) -> None:
        pass

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        assert data["prompt"]  # of the dataset: the policy did not pass it on
        uniform = torch.full((1,), 1.0 / DIGITS).log()
        return {"reference_logprobs": [uniform for _ in data["response_ids"]]}


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))


class ToyValue(TorchModule):
    """Expects the same of every sample; learns it."""

    default_threads = 1

    def setup(self) -> None:
        self.model = Mean()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        return {"values": [self.model.mean.detach().clone() for _ in data["response_ids"]]}

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        loss = torch.stack([(self.model.mean - b["reward"]).square().mean() for b in data]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}


class CarefulReward(ToyReward):
    """Sees what policy, reference and value said of a sample; passes all of it on."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        assert data["prompt"]
        found = super().forward_step(data)
        if "values" in data:
            found["surprise"] = firsts(data["reference_logprobs"]) - firsts(data["values"])
        return {**data, **found}


class PPOToyTrainer(ToyTrainer):
    def prepare_batch(self, data: dict[str, Any]) -> dict[str, Any]:
        kl = firsts(data["behaviour_logprobs"]) - firsts(data["reference_logprobs"])
        return {**data, "reward": data["reward"] - 0.01 * kl, "kl": kl}


@pytest.mark.slow
def test_rlhf_trains_policy_and_value_and_both_are_followed(store: Path) -> None:
    engine = RLHFEngine(
        TersePolicy("policy"),
        ToyReference("reference"),
        CarefulReward("reward"),
        ToyValue("value"),
        PPOToyTrainer("ppo_policy"),
        ToyValue("ppo_value"),
    )
    engine.set_dataset(ROWS).set_eval_dataset(ROWS[:16])
    result = learn(engine, store, "rlhf", eval_episode_interval=3)
    assert result.version == 3
    assert set(commits(store, "rlhf")[0]["checkpoints"]) == {"ppo_policy", "ppo_value"}
    assert result.evaluations[3]["reward"] > result.evaluations[0]["reward"]
    assert "ppo_policy/kl" in result.episodes[2]
    assert result.episodes[2]["ppo_value/loss"] < result.episodes[0]["ppo_value/loss"]
    scored = samples(store, "rlhf", "scoring")
    assert {"reference_logprobs", "values", "reward", "surprise"} <= set(scored.columns)
    values = scored.groupby("episode")["values"].agg(lambda v: float(v.iloc[0][0]))
    assert values[0] == 0.0
    assert values[1] > 0.1  # the value model follows its trainer
    assert list(samples(store, "rlhf")["prompt"]) == [
        str(row) for row in samples(store, "rlhf")["prompt_row"]
    ]


class PairTrainer(ToyTrainer):
    """Learns the chosen digit, by how much the reference prefers the other."""

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return Pairs(prompts)

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        found = []
        for batch in data:
            logprobs = self.model.preferences.log_softmax(-1)
            h = logprobs[batch["better"]] - logprobs[batch["worse"]]
            found.append(-(h - batch.get("reference_h", 0.0)).sigmoid().log().mean())
        loss = torch.stack(found).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}


class Pairs(Rows):
    """Every pair of a row an item."""

    def __init__(self, rows: Any) -> None:
        super().__init__(pair_rows(rows))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"better": int(row["chosen"]), "worse": int(row["rejected"])}


class PairReference(ToyReward):
    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return Pairs(prompts)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        return {"reference_h": torch.zeros(len(data["better"]))}


PAIRS = [
    {"prompt": str(i), "pos_answers": ["7", "8"], "neg_answers": [str(i % 7), "9"]}
    for i in range(16)
]


@pytest.mark.slow
def test_dpo_trains_on_every_pair_and_samples_nothing(store: Path) -> None:
    engine = DPOEngine(PairReference("reference"), PairTrainer("ppo_policy")).set_dataset(PAIRS)
    result = learn(engine, store, "dpo", num_inference_per_prompt=1)
    assert set(result.seconds) == {"scoring", "training"}
    assert result.episodes[2]["loss"] < result.episodes[0]["loss"]
    scored = samples(store, "dpo", "scoring").query("episode == 0")
    assert sorted(scored["prompt_row"]) == list(range(32))  # two pairs of each of 16 rows
    assert sorted(set(scored["better"])) == [7, 8]


class BestOfGroup(ToyTrainer):
    def prepare_batch(self, data: dict[str, Any]) -> dict[str, Any]:
        assert {"reference_logprobs", "reward", "group"} <= set(data)
        assert len(data["group"]) == RUNTIME["train_global_batch_size"]
        return data


@pytest.mark.slow
def test_online_dpo_gives_the_trainer_whole_groups(store: Path) -> None:
    engine = OnlineDPOEngine(
        TersePolicy("policy"), ToyReference("reference"), CarefulReward("reward"), BestOfGroup("t")
    )
    engine.set_dataset(ROWS).set_eval_dataset(ROWS[:16], Judge("judge"))
    result = learn(engine, store, "online", num_episode=2)
    assert result.version == 2
    assert result.evaluations[2]["reward"] > result.evaluations[0]["reward"]
    assert result.evaluations[2]["verdict"] == pytest.approx(result.evaluations[2]["exact"])


class Judge(BaseModule):
    """Sees prompts, completions and rewards; defines nothing but `eval_step`."""

    default_threads = 1

    def setup(self) -> None:
        pass

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        assert data["prompt"]
        assert data["completion"]
        return {"verdict": (data["reward"] == 1.0).float()}


@pytest.mark.long
def test_evaluation_asks_each_model_in_turn(store: Path) -> None:
    models = [TersePolicy("policy"), ToyReward("reward"), Judge("judge")]
    engine = EvalEngine(models).set_dataset(ROWS[:16])
    found = learn(engine, store, "eval").evaluations[0]
    assert found["verdict"] == pytest.approx(found["exact"])
    batches = engine.evaluate()  # those that are there
    assert list(batches) == ["policy", "reward", "judge"]
    verdicts = torch.cat([batch["verdict"] for batch in batches["judge"]])
    assert float(verdicts.mean()) == pytest.approx(found["verdict"])
    with pytest.raises(ConfigError, match="without models"):
        EvalEngine([])


class Preferring(PairReference, TorchModule):
    """Follows a PairTrainer."""

    def setup(self) -> None:
        self.model = Digits()

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        preferences = self.model.preferences.detach()
        return {"accuracy": (preferences[data["better"]] > preferences[data["worse"]]).float()}


def test_a_reward_model_is_trained_and_evaluated_on_held_out_pairs(store: Path) -> None:
    engine = RewardModelEngine(PairTrainer("trainer"), Preferring("reward"))
    engine.set_dataset(PAIRS).set_eval_dataset(PAIRS[:4])
    result = learn(engine, store, "reward", num_inference_per_prompt=1)
    assert result.evaluations[0]["accuracy"] == 0.0
    assert result.evaluations[3]["accuracy"] == 1.0
    bare = RewardModelEngine(PairTrainer("trainer"))
    with pytest.raises(ConfigError, match=r"RewardModelEngine\(trainer, RewardModel"):
        bare.set_eval_dataset(PAIRS)


class Slow(Preferring):
    """Is behind its trainer by versions."""

    def load_weights(self, weights: Any) -> None:
        time.sleep(0.5)
        super().load_weights(weights)


@pytest.mark.long
def test_weights_are_kept_until_a_slow_follower_has_them(store: Path) -> None:
    engine = RewardModelEngine(PairTrainer("trainer"), Slow("reward"))
    engine.set_dataset(PAIRS).set_eval_dataset(PAIRS[:4])
    result = learn(engine, store, "slow", num_inference_per_prompt=1, num_episode=5, keep_last=1)
    assert result.evaluations[5]["accuracy"] == 1.0
    left = {path.parts[-3] for path in (store / "slow/weights").glob("version=*/*/*")}
    assert left == {"version=000005"}
