from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_flows.modules.fingerprint import fingerprint


class Plain:
    def __init__(self, value: object) -> None:
        self.value: Any = value


@dataclass(frozen=True)
class WithDefaults:
    """Its `__init__` closes over an object without attributes."""

    value: object
    more: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize("kind", [Plain, WithDefaults])
@pytest.mark.parametrize("others", [0, 1, 7])
def test_every_object_counts_however_many_came_before_it(kind: Any, others: int) -> None:
    before = [kind(i) for i in range(others)]
    found = {fingerprint([*before, kind(value), *before]) for value in (1.0, 2.0, "2", None)}
    assert len(found) == 4


def test_an_object_that_holds_itself_has_a_fingerprint() -> None:
    thing = Plain(None)
    thing.value = [thing, {"own": thing}]
    assert fingerprint(thing) == fingerprint(thing)
