"""A handful of seeds of the campaign; `make chaos SEEDS=200` does two hundred."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.campaign import Campaign, Outcome, deaths_of, table
from tests.chaos.kinds import KINDS, SECOND_RANK
from tests.chaos.points import POINTS, RANK_POINTS


@pytest.fixture(scope="module")
def chaos(services: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("chaos"), address=services)
    campaign.undisturbed()
    yield campaign
    campaign.close()


@pytest.mark.parametrize("seed", [11, 22, 34])
def test_whoever_dies_wherever_the_run_ends_as_if_nobody_had(chaos: Campaign, seed: int) -> None:
    outcome = chaos.run(seed)
    assert not outcome.failure, outcome.failure
    assert any(outcome.died), f"nobody came to die: {outcome.deaths}"


def test_the_seeds_of_a_campaign_go_through_every_point_and_are_fixed() -> None:
    first = [deaths_of(seed, 10.0) for seed in range(len(POINTS))]
    assert {(deaths[0].who, deaths[0].point) for deaths in first} == set(POINTS)
    assert first == [deaths_of(seed, 10.0) for seed in range(len(POINTS))]
    assert any(death.point is None for deaths in first for death in deaths)
    assert {d.who for deaths in first for d in deaths} == {
        "flow",
        "policy",
        "reward",
        "trainer",
        "trainer rank 1",
    }


def test_a_trainer_of_ranks_dies_at_each_of_its_points_and_never_more_than_twice_a_seed() -> None:
    seeds = range(len(RANK_POINTS) // 2)
    found = [deaths_of(seed, 10.0, kind="ranks") for seed in seeds]
    assert {(d.who, d.point) for deaths in found for d in deaths} >= set(RANK_POINTS)
    for deaths in found:
        assert [d.who for d in deaths[2:] if d.who.startswith("trainer")] == []
    assert all(KINDS["ranks"].ranks_of(seed) == 2 for seed in seeds)
    anywhere = {point for who, point in RANK_POINTS if who == SECOND_RANK}
    assert {point for who, point in RANK_POINTS if who == "trainer"} > anywhere


def test_the_table_counts_deaths_that_happened_and_the_exact_runs_among_them() -> None:
    deaths = deaths_of(0, 10.0)[:1]
    outcomes = [
        Outcome(seed=0, deaths=deaths, died=[True]),
        Outcome(seed=1, deaths=deaths, died=[True], failure="other weights"),
        Outcome(seed=2, deaths=deaths, died=[False]),
    ]
    assert f"| {deaths[0].who} | {deaths[0].where} | 2 | 1 | 1 |" in table(outcomes)
