"""A reference that follows the average of the policy: by version, and to the bit through kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_flows import GRPOEngine
from rlhf_flows.errors import ConfigError
from rlhf_flows.exports import exported_model
from rlhf_flows.models import PolicyTrainer, Reference, TorchPolicy
from rlhf_flows.models.tiny import build_tiny_qwen2
from tests.end_to_end.processes import run_victim
from tests.end_to_end.whole_run import (
    assert_exactly_once,
    assert_same_bits,
    commits,
    learn,
    samples,
    toy_engine,
)
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

pytestmark = pytest.mark.usefixtures("services")

ETA, EPISODES = 0.25, 4
RUNTIME: dict[str, Any] = {"num_episode": EPISODES, "max_attempts": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("followed")


@pytest.fixture(scope="module")
def whole(store: Path, services: str) -> str:
    """A run in one go."""
    learn(toy_engine(reference_ema=ETA), store, "whole", keep_last=EPISODES, **RUNTIME)
    return "whole"


def preferences(store: Path, record: dict[str, Any]) -> Tensor:
    folder = store / record["weights"]["prefix"]
    return load_file(folder / "model.safetensors")["preferences"]


def averages(store: Path, run: str, *, eta: float) -> list[Tensor]:
    """Of each version, from the weights that were committed."""
    found = [torch.zeros(10)]
    for commit in commits(store, run):
        now = preferences(store, commit["checkpoints"]["trainer"])
        found.append(eta * now + (1 - eta) * found[-1])
    return found


def assert_scored_by(store: Path, run: str, versions: list[Tensor], *, staleness: int = 0) -> None:
    """Every sample's reference logprob is that of the version which its episode is due."""
    scored = samples(store, run, "scoring").merge(
        samples(store, run)[["sample_id", "digit"]], on="sample_id"
    )
    assert len(scored) == EPISODES * 32
    for episode, digit, found in zip(
        scored["episode"], scored["digit"], scored["reference_logprobs"], strict=True
    ):
        expected = versions[max(0, episode - staleness)].log_softmax(-1)[digit]
        assert float(found[0]) == pytest.approx(float(expected), abs=1e-5)


def test_the_reference_of_each_episode_is_the_average_of_its_version(
    store: Path, whole: str
) -> None:
    expected = averages(store, whole, eta=ETA)
    for commit, average in zip(commits(store, whole), expected[1:], strict=True):
        record = commit["checkpoints"]["trainer"]["averages"]["reference"]
        torch.testing.assert_close(preferences(store, record), average, atol=1e-6, rtol=1e-6)
        assert record["digest"] != commit["checkpoints"]["trainer"]["digest"]
    assert_scored_by(store, whole, expected)
    plans = sorted((store / whole / "episodes").glob("episode=*/plan-00.json"))
    for episode, path in enumerate(plans):
        versions = json.loads(path.read_text())["versions"]
        assert versions == {"policy": episode, "reference": episode}
    folder = exported_model(str(store), whole, module="reference")
    assert torch.equal(load_file(folder / "model.safetensors")["preferences"], preferences(
        store, commits(store, whole)[-1]["checkpoints"]["trainer"]["averages"]["reference"]
    ))  # fmt: skip


@pytest.mark.slow
def test_at_its_ends_it_is_the_policy_or_the_start(store: Path) -> None:
    learn(toy_engine(reference_ema=1.0, eval_rows=0), store, "near", **RUNTIME)
    learn(toy_engine(reference_ema=0.0, eval_rows=0), store, "far", **RUNTIME)
    scored, sampled = samples(store, "near", "scoring"), samples(store, "near")
    for ours, theirs in zip(
        scored["reference_logprobs"], sampled["behaviour_logprobs"], strict=True
    ):
        assert ours[0] == theirs[0]
    assert {float(row[0]) for row in samples(store, "far", "scoring")["reference_logprobs"]} == {
        float(torch.zeros(10).log_softmax(-1)[0])
    }


@pytest.mark.long
def test_with_staleness_the_reference_lags_as_the_policy_does(store: Path) -> None:
    engine = toy_engine(reference_ema=ETA, eval_rows=0)
    learn(engine, store, "stale", max_staleness=1, keep_last=EPISODES, **RUNTIME)
    assert_scored_by(store, "stale", averages(store, "stale", eta=ETA), staleness=1)
    assert_exactly_once(store, "stale", episodes=EPISODES, staleness=1)


@pytest.mark.long
def test_a_reference_that_is_synced_seldom_holds_the_average_of_its_version(store: Path) -> None:
    engine = toy_engine(reference_ema=ETA, eval_rows=0)
    models = {"reference": {"sync_frequency": 2}}
    learn(engine, store, "seldom", models=models, keep_last=EPISODES, **RUNTIME)
    versions = averages(store, "seldom", eta=ETA)
    assert_scored_by(store, "seldom", [versions[e // 2 * 2] for e in range(EPISODES)])


@pytest.mark.long
def test_retention_takes_the_averages_with_the_weights(store: Path) -> None:
    learn(toy_engine(reference_ema=ETA, eval_rows=0), store, "kept", keep_last=1, **RUNTIME)
    for version in range(1, EPISODES + 1):
        folder = store / "kept" / "weights" / f"version={version:06d}"
        found = [p.name.rpartition("-")[0] for p in folder.iterdir() if any(p.iterdir())] \
            if folder.exists() else []  # fmt: skip
        wanted = ["trainer", "trainer-average-reference"] if version == EPISODES else []
        assert sorted(found) == wanted


@pytest.mark.long
def test_between_full_checkpoints_the_average_is_made_again_and_compared(
    store: Path, whole: str
) -> None:
    settings = {**RUNTIME, "save_episode_interval": 3, "keep_last": EPISODES}
    learn(toy_engine(reference_ema=ETA, eval_rows=0), store, "sparse", **settings)
    for path in (store / "sparse/episodes").glob("episode=00000[23]/*.json"):
        path.unlink()
    learn(toy_engine(reference_ema=ETA, eval_rows=0), store, "sparse", **settings)
    assert digests(store, "sparse") == digests(store, whole)


def digests(store: Path, run: str) -> list[tuple[str, str]]:
    records = [commit["checkpoints"]["trainer"] for commit in commits(store, run)]
    return [(r["digest"], r["averages"]["reference"]["digest"]) for r in records]


@pytest.mark.long  # tests/end_to_end/test_kill.py does it to a run without an average
def test_a_run_killed_around_every_commit_and_sync_ends_with_the_same_bits(
    store: Path, whole: str, services: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"address": services, "reference_ema": ETA, "keep_last": EPISODES}
    for point in (
        "before commit 0",
        "after commit 0",
        "started param_sync 1",
        "advanced training 1 1",
        "after commit 2",
        "started param_sync 3",
    ):
        died = run_victim(store, "killed", tmp_path / "log", die=point, **how, **RUNTIME)
        assert died == -9, point
    learn(
        toy_engine(reference_ema=ETA), store, "killed", address=services, keep_last=EPISODES,
        **RUNTIME,
    )  # fmt: skip
    assert digests(store, "killed") == digests(store, whole)
    assert_same_bits(store, "killed", reference=whole)
    assert_exactly_once(store, "killed", episodes=EPISODES)


def test_what_cannot_be_averaged_is_refused_before_anything_starts(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"eta=1\.5 .* between 0 and 1"):
        toy_engine(reference_ema=1.5)
    with pytest.raises(ConfigError, match="needs a reference that follows"):
        GRPOEngine(ToyPolicy("p"), ToyTrainer("t"), ToyReward("r"), reference_ema=0.1)
    here, there = (
        build_tiny_qwen2(tmp_path / name, hidden_size=32, num_layers=1) for name in ("a", "b")
    )
    engine = GRPOEngine(
        TorchPolicy("policy", path=here),
        PolicyTrainer("trainer", path=here),
        ToyReward("reward"),
        Reference("reference", path=there),
        reference_ema=0.1,
    )
    engine.set_dataset([{"prompt": "1"}])
    with pytest.raises(ConfigError, match=r"begins at the weights in .*/a'.* from .*/b'"):
        engine.check()
