"""The example of RLHF, shortened: both rewards rise, and a second start does nothing again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from examples.rlhf_ppo import Sizes, preferences, train
from rlhf_flows.deployments import sort_digits


def test_preferences_prefer_what_is_better_and_know_no_held_out_prompt() -> None:
    rows = preferences(200, sort_digits.training_prompts(500), seed=0)
    held_out = {row["prompt"] for row in sort_digits.held_out_prompts(2048)}
    for row in rows:
        answer = "".join(sorted(row["prompt"][:-1]))
        better, worse = (
            sort_digits.reward(row["prompt"], row[name], answer)["reward"]
            for name in ("chosen", "rejected")
        )
        assert better > worse
        assert row["prompt"] not in held_out
    assert rows == preferences(200, sort_digits.training_prompts(500), seed=0)


@pytest.mark.long  # three runs of training: four minutes
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("services")
def test_the_learnt_reward_and_the_truth_rise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FLOWS_CACHE", str(tmp_path / "cache"))
    sizes = Sizes(warmup_steps=120, reward_steps=80, num_episode=4, sampler="transformers")
    done = train("short", str(tmp_path), sizes)
    before, after = done.evaluations[0], done.evaluations[4]
    assert after["reward"] > before["reward"] + 0.5
    assert after["exact"] > before["exact"]
    assert (tmp_path / "short" / "rlhf_ppo.png").stat().st_size > 0
    started = time.monotonic()
    again = train("short", str(tmp_path), sizes)
    assert again.evaluations == done.evaluations
    assert time.monotonic() - started < 60  # nothing is trained or sampled again
