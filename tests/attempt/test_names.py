"""Names of runs by template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from rlhf_flows.attempt import fill_in, is_template, named_by_flow_run
from rlhf_flows.errors import ConfigError


@dataclass(frozen=True)
class Started:
    id: UUID
    expected_start_time: datetime | None


STARTED = Started(
    UUID("1234abcd-0000-4000-8000-000000000000"), datetime(2026, 11, 30, 3, 15, tzinfo=UTC)
)


def test_a_template_is_filled_in_by_the_flow_run() -> None:
    assert named_by_flow_run("nightly-{date}", STARTED) == "nightly-2026-11-30"
    assert named_by_flow_run("{id}.{time}", STARTED) == "1234abcd.031500"
    assert named_by_flow_run("plain", STARTED) == "plain"


def test_the_day_is_that_of_utc_wherever_the_schedule_is_from() -> None:
    east = timezone(timedelta(hours=9))
    started = replace(STARTED, expected_start_time=datetime(2026, 12, 1, 3, 0, tzinfo=east))
    assert named_by_flow_run("{date}", started) == "2026-11-30"


def test_without_a_flow_run_it_is_now() -> None:
    assert re.fullmatch(r"a-\d{4}-\d\d-\d\d-[0-9a-f]{8}", fill_in("a-{date}-{id}"))
    assert not is_template(None)
    assert not is_template("a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n-{day}", r"asks for \{day\}.*\{date\}"),
        ("n-{date:%H}", "a name may hold"),
        ("n-{date", "is no template"),
        ("n-{date!r}", "a name may hold"),
        ("n/{date}", "cannot be named 'n/20"),
        ("../n", "cannot be named"),
    ],
)
def test_what_is_no_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fill_in(name)
