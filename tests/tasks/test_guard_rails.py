"""When a run is stopped, by the metrics of its last episodes; and what only looks wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_flows.config import EngineConfig
from rlhf_flows.config_loading import load_config
from rlhf_flows.errors import ConfigError
from rlhf_flows.guard_settings import StopIf
from rlhf_flows.tasks.guard_rails import Trained, alarms, bad_since, broken


def history(first: int = 0, **metrics: Sequence[float]) -> list[Trained]:
    """Episodes with these values; None is an episode without the metric."""
    (count,) = {len(values) for values in metrics.values()}
    return [
        Trained(
            episode=first + i,
            metrics={name: values[i] for name, values in metrics.items() if values[i] is not None},
        )
        for i in range(count)
    ]


def stop_if(**settings: Any) -> StopIf:
    return StopIf.model_validate(settings)


def stops_at(rails: StopIf, episodes: list[Trained]) -> int | None:
    """The episode that a run would end with."""
    ends = (i for i in range(len(episodes)) if broken(rails, episodes[: i + 1]) is not None)
    return next(ends, None)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "no rail": ({}, {"kl": [9.0], "reward": [-9.0]}, None),
    "above": ({"kl_above": 0.2}, {"kl": [0.1, 0.2, 0.21]}, 2),
    "below": ({"reward_below": 0.5}, {"reward": [0.5, 0.6, 0.4]}, 2),
    "entropy": ({"entropy_below": 0.1}, {"entropy": [0.5, 0.05]}, 1),
    "in a row": ({"reward_below": 0.5, "for_episodes": 2}, {"reward": [0, 1, 0, 1, 0, 0, 0]}, 5),
    "never in a row": ({"reward_below": 0.5, "for_episodes": 2}, {"reward": [0, 1, 0, 1]}, None),
    "each by itself": (
        {"reward_below": 0.5, "kl_above": 1, "for_episodes": 2},
        {"reward": [0, 1, 0, 0], "kl": [0, 2, 0, 0]},
        3,
    ),
    "absent ends what counted": (
        {"kl_above": 1, "for_episodes": 2},
        {"kl": [2, None, 2, 2]},
        3,
    ),
    "another metric": (
        {"metrics": [{"metric": "grad_norm", "above": 5, "below": 1, "for_episodes": 2}]},
        {"grad_norm": [0.5, 3, 6, 0.5]},
        3,
    ),
    "of several modules": ({"kl_above": 1}, {"policy/kl": [0.5, 2.0], "value/loss": [1, 1]}, 1),
    "of one of them": (
        {"metrics": [{"metric": "a/loss", "above": 1}]},
        {"a/loss": [0.5, 0.5], "b/loss": [2.0, 2.0]},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stops_at_the_first_episode_that_completes_what_a_rail_forbids(case: str) -> None:
    settings, metrics, expected = CASES[case]
    assert stops_at(stop_if(**settings), history(**metrics)) == expected


def test_what_broke_names_setting_first_bad_episode_and_values() -> None:
    rails = stop_if(reward_below=0.5, for_episodes=2)
    found = broken(rails, history(first=4, reward=[0.9, 0.4, 0.3], loss=[1, 1, 1]))
    assert found is not None
    assert (found.setting, found.first_bad, found.values) == ("reward_below", 5, {"reward": 0.3})
    assert found.what == "reward is below 0.5 (episode 5: reward 0.4; episode 6: reward 0.3)"


def test_the_bad_episodes_are_counted_beyond_those_that_a_changed_rail_asks_for() -> None:
    episodes = history(first=2, reward=[1, 0, 0, 0], kl=[0, 0, 2, 2])
    rails = stop_if(reward_below=0.5, kl_above=1, for_episodes=2)
    assert bad_since(rails, episodes) == 3
    found = broken(rails, episodes)
    assert found is not None
    assert found.setting == "kl_above"
    assert bad_since(stop_if(kl_above=3), episodes) is None


def test_a_metric_that_is_not_finite_stops_where_it_is_vital_and_is_an_alarm_where_not() -> None:
    reward = [Trained(episode=3, metrics={}, nonfinite=("trainer/reward",))]
    part = [Trained(episode=3, metrics={}, nonfinite=("format",))]
    assert broken(stop_if(), part) is None
    assert [alarm.kind for alarm in alarms(part)] == ["nan"]
    found = broken(stop_if(), reward)
    assert found is not None
    assert found.what == "trainer/reward of episode 3 is NaN or infinite"
    assert broken(stop_if(nan=False), reward) is None
    # It is beyond every bound that somebody set.
    assert broken(stop_if(nan=False, reward_below=-100), reward) is not None


def test_a_commit_is_read_as_it_was_written() -> None:
    commit = {"episode": 2, "metrics": {"loss": 1.0}, "nonfinite": ["kl"], "seconds": 1.0}
    trained = Trained.of(commit)
    assert trained.values("loss") == {"loss": 1.0}
    assert list(trained.values("kl")) == ["kl"]
    assert Trained.of({"episode": 2, "metrics": {"loss": 1.0}}).nonfinite == ()


# ---- alarms -----------------------------------------------------------------------------------


def kinds(**metrics: Sequence[float]) -> list[str]:
    return [alarm.kind for alarm in alarms(history(**metrics))]


def test_a_reward_far_below_those_before_is_a_collapse_and_noise_is_not() -> None:
    noisy = [0.5, 0.6, 0.4, 0.5, 0.6, 0.4]
    # Mean 0.5, standard deviation 0.0816: four of them below is 0.173.
    assert kinds(reward=[*noisy, 0.17]) == ["reward-collapse"]
    assert kinds(reward=[*noisy, 0.18]) == []
    assert kinds(reward=[*noisy[:4], 0.0]) == [], "too few before it to say"
    # Without any noise a fifth of the mean counts.
    assert kinds(reward=[1.0] * 6 + [0.81]) == []
    assert kinds(reward=[1.0] * 6 + [0.79]) == ["reward-collapse"]


def test_a_kl_of_many_times_those_before_is_a_blow_up_unless_it_is_small() -> None:
    assert kinds(kl=[0.02] * 6 + [0.21]) == ["kl-blow-up"]
    assert kinds(kl=[0.02] * 6 + [0.19]) == []
    assert kinds(kl=[0.001] * 6 + [0.09]) == []


def test_an_alarm_is_told_where_it_begins() -> None:
    assert kinds(reward=[1.0] * 6 + [0.0]) == ["reward-collapse"]
    assert kinds(reward=[1.0] * 6 + [0.0, -1.0]) == []


# ---- settings ---------------------------------------------------------------------------------


def test_rails_are_read_from_words() -> None:
    words = ["runtime.stop_if.kl_above=0.3", "runtime.stop_if.metrics=[{metric: loss, above: 2}]"]
    found = load_config(EngineConfig, words).runtime.stop_if
    assert found.nan
    assert [(setting, rail.metric) for setting, rail in found.rails()] == [
        ("kl_above", "kl"),
        ("metrics", "loss"),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("runtime.stop_if.metrics=[{metric: loss}]", "names 'loss' without a bound"),
        ("runtime.stop_if.kl_abov=1", "did you mean 'runtime.stop_if.kl_above'"),
        ("runtime.stop_if.for_episodes=0", "runtime.stop_if.for_episodes"),
    ],
)
def test_a_rail_that_cannot_be_meant_is_refused(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(EngineConfig, [words])
