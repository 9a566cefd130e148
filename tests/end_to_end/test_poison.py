"""Samples that end or hang their worker: found, named, left out with their group; nothing else."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_flows.data.plan import EpisodePlan
from rlhf_flows.errors import QuarantineError
from rlhf_flows.modules import BaseModule
from tests.end_to_end.processes import generated, start_victim
from tests.end_to_end.test_damage import flip_a_byte
from tests.end_to_end.test_resume import forget
from tests.end_to_end.whole_run import (
    commits,
    learn,
    samples,
    shard_digests,
    toy_engine,
    weight_digests,
)
from tests.incidents import Incidents
from tests.toys import ToyPolicy

# Its runs take a minute and a half together.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("services")]

SMALL: dict[str, Any] = {
    "num_episode": 2,
    "sample_per_episode": 12,
    "num_inference_per_prompt": 2,
    "generation_batch_size": 4,
    "train_global_batch_size": 4,
}
"""Three shards of two groups of two; three optimizer steps an episode."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poisoned")


@pytest.fixture(scope="module")
def plain(store: Path, services: str) -> str:
    """A run that nothing happens to."""
    learn(toy_engine(eval_rows=0), store, "plain", **SMALL)
    return "plain"


def planned(store: Path, run: str, episode: int) -> EpisodePlan:
    path = store / run / f"episodes/episode={episode:06d}/plan-00.json"
    return EpisodePlan.from_json(json.loads(path.read_text()))


def records(store: Path, run: str) -> list[dict[str, Any]]:
    paths = sorted((store / run).glob("episodes/*/quarantine/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def shards_of(store: Path, run: str, episode: int) -> dict[str, str]:
    folder = f"episodes/episode={episode:06d}/"
    return {k: v for k, v in shard_digests(store, run).items() if k.startswith(folder)}


@pytest.fixture(scope="module")
def heard() -> Incidents:
    return Incidents()


@pytest.fixture(scope="module")
def poisoned(
    store: Path, plain: str, services: str, heard: Incidents
) -> dict[str, tuple[str, ...]]:
    """Groups of a run whose first samples are poison: one ends the policy, one hangs the reward.

    Its flow is killed amid the search for the first; then it goes on. One of the held-out samples
    ends the policy, too.
    """
    ends = planned(store, plain, 0).groups(1)[0]
    hangs = planned(store, plain, 1).groups(2)[0]
    settings: dict[str, Any] = {**SMALL, "shard_timeout_s": 4}
    poison = [ends[0], "v000002-r000000-s00"]
    log = store / "poisoned.calls"
    victim = start_victim(
        store, "poisoned", log, die="never", address=services, ends=poison, **settings
    )
    try:
        deadline = time.monotonic() + 200
        # The whole shard twice; the third time is a part of it.
        while not log.exists() or generated(log).count(ends[0]) < 3:
            assert victim.poll() is None, log.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        victim.kill()
        victim.wait()
    assert records(store, "poisoned") == []
    engine = toy_engine(log=log, ends=poison, hangs=hangs[:1])
    learn(engine, store, "poisoned", address=services, progress=heard, **settings)
    return {"ends": ends, "hangs": hangs}


def test_a_sample_that_ends_or_hangs_its_worker_is_recorded_with_its_cause(
    store: Path, poisoned: dict[str, tuple[str, ...]]
) -> None:
    ended, hung = records(store, "poisoned")
    assert (ended["sample_id"], ended["phase"]) == (poisoned["ends"][0], "rollout")
    assert (ended["module"], ended["attempt"]) == ("policy", 2)
    assert "died during" in ended["cause"]
    assert (hung["sample_id"], hung["phase"]) == (poisoned["hangs"][0], "scoring")
    assert hung["module"] == "reward"
    assert "waited 6 s for" in hung["cause"]  # its own four, and the patience with the store


def test_it_is_told_as_it_happens_as_are_the_deaths_that_it_causes(
    poisoned: dict[str, tuple[str, ...]], heard: Incidents
) -> None:
    left_out = {(f["sample"], f["phase"], f["module"]) for f in heard.of("quarantine")}
    assert left_out == {
        (poisoned["ends"][0], "rollout", "policy"),
        (poisoned["hangs"][0], "scoring", "reward"),
        ("v000002-r000000-s00", "evaluation", "policy"),
    }
    assert {f["pool"] for f in heard.of("actor-restart")} == {"policy", "reward"}


def test_its_group_is_left_out_from_its_phase_on_and_counted(
    store: Path, poisoned: dict[str, tuple[str, ...]]
) -> None:
    sampled = set(samples(store, "poisoned")["sample_id"])
    scored = set(samples(store, "poisoned", "scoring")["sample_id"])
    everything = set(samples(store, "plain")["sample_id"])
    assert everything - sampled == set(poisoned["ends"])
    assert everything - scored == {*poisoned["ends"], *poisoned["hangs"]}
    for commit, sample in zip(
        commits(store, "poisoned"), (poisoned["ends"][0], poisoned["hangs"][0]), strict=True
    ):
        assert commit["quarantined"] == [sample]
        assert commit["rows"] == {"planned": 12, "trained": 10, "filtered": 0, "quarantined": 2}


def test_though_killed_amid_the_search_all_else_is_what_it_would_have_been(
    store: Path, plain: str, poisoned: dict[str, tuple[str, ...]]
) -> None:
    ours, theirs = shards_of(store, "poisoned", 0), shards_of(store, plain, 0)
    differ = {key for key in theirs if ours[key] != theirs[key]}
    assert differ == {
        f"episodes/episode=000000/{p}/shard-00001.parquet" for p in ("rollout", "scoring")
    }
    for phase in ("rollout", "scoring"):
        ours_, theirs_ = (samples(store, run, phase) for run in ("poisoned", plain))
        theirs_ = theirs_[theirs_["sample_id"].isin(ours_["sample_id"]) & (theirs_["episode"] == 0)]
        ours_ = ours_[ours_["episode"] == 0]
        assert ours_.reset_index(drop=True).equals(theirs_.reset_index(drop=True))
    assert weight_digests(store, "poisoned") != weight_digests(store, plain)


def test_an_evaluation_goes_on_without_it_and_names_it(
    store: Path, poisoned: dict[str, tuple[str, ...]]
) -> None:
    (path,) = (store / "poisoned").glob("evaluations/version=000002/*/done.json")
    done = json.loads(path.read_text())
    assert [blamed["sample_id"] for blamed in done["quarantined"]] == ["v000002-r000000-s00"]
    assert done["rows"] == 15
    assert done["metrics"]["reward"] > 0


def test_more_of_them_than_allowed_stop_the_run_and_are_named(store: Path, plain: str) -> None:
    first = planned(store, plain, 0)
    ends = [first.groups(0)[0][0]]
    settings = {**SMALL, "num_episode": 1, "generation_batch_size": 2, "max_quarantined": 0}
    with pytest.raises(QuarantineError) as raised:
        learn(toy_engine(eval_rows=0, ends=ends), store, "toomany", **settings)
    for word in (ends[0], "'policy'", "died", "episode 0", "runtime.max_quarantined=0"):
        assert word in str(raised.value)
    assert records(store, "toomany") == []


def test_a_sample_that_ends_its_worker_in_a_repair_is_left_out_of_the_training_under_way(
    store: Path, plain: str
) -> None:
    settings = {**SMALL, "num_episode": 1}
    ends = planned(store, plain, 0).groups(1)[0][:1]
    learn(toy_engine(eval_rows=0, ends=ends), store, "from-the-start", **settings)
    learn(toy_engine(eval_rows=0), store, "repaired", **settings)
    forget(store, "repaired", "episodes/episode=000000/trained.json")
    flip_a_byte(store / "repaired/episodes/episode=000000/rollout/shard-00001.parquet")
    learn(toy_engine(eval_rows=0, ends=ends), store, "repaired", **settings)
    (commit,) = commits(store, "repaired")
    assert commit["quarantined"] == list(ends)
    assert commit["rows"] == {"planned": 12, "trained": 10, "filtered": 0, "quarantined": 2}
    assert weight_digests(store, "repaired") == weight_digests(store, "from-the-start")


class Killed(ToyPolicy):
    """Is killed from outside in the first calls: the file counts how often still."""

    def __init__(self, name: str, kills: Path) -> None:
        super().__init__(name)
        self.kills = kills

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        left = int(self.kills.read_text())
        if left:
            self.kills.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward_step(data, iteration)


def test_kills_from_outside_blame_nobody(store: Path, plain: str, tmp_path: Path) -> None:
    from rlhf_flows.engines import GRPOEngine
    from tests.toys import ToyReward, ToyTrainer

    kills = tmp_path / "kills"
    # A whole shard that fails twice is searched; now all goes well, so it was an accident.
    kills.write_text("2")
    policy: BaseModule = Killed("policy", kills)
    engine = GRPOEngine(policy, ToyTrainer("trainer"), ToyReward("reward"), name="toy")
    engine.set_dataset([{"prompt": str(i)} for i in range(64)])
    learn(engine, store, "accident", **{**SMALL, "generation_batch_size": 12})
    assert kills.read_text() == "0"
    assert records(store, "accident") == []
    assert weight_digests(store, "accident") == weight_digests(store, plain)
    for phase in ("rollout", "scoring"):
        assert samples(store, "accident", phase).equals(samples(store, plain, phase))
