"""A handful of seeds of the campaign; `make chaos SEEDS=200` does two hundred."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.campaign import Campaign, Outcome, deaths_of, table
from tests.chaos.points import POINTS


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


def test_the_table_counts_deaths_that_happened_and_the_exact_runs_among_them() -> None:
    deaths = deaths_of(0, 10.0)[:1]
    outcomes = [
        Outcome(seed=0, deaths=deaths, died=[True]),
        Outcome(seed=1, deaths=deaths, died=[True], failure="other weights"),
        Outcome(seed=2, deaths=deaths, died=[False]),
    ]
    assert f"| {deaths[0].who} | {deaths[0].where} | 2 | 1 | 1 |" in table(outcomes)
