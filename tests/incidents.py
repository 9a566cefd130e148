"""Who is told of incidents: it finds in each what its event is said to hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_flows.services.event_names import FIELDS, INCIDENT
from rlhf_flows.tasks import NoProgress


class Incidents(NoProgress):
    """Keeps the kind and the facts of each."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []

    def incident(self, kind: str, what: str, facts: Mapping[str, Any]) -> None:
        wanted = [set(field.split(" or ")) for field in FIELDS[f"{INCIDENT}{kind}"]]
        assert what
        assert len(facts) == len(wanted), (kind, facts)
        assert all(len(names & facts.keys()) == 1 for names in wanted), (kind, facts)
        self.told.append((kind, facts))

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The facts of those of one kind."""
        return [facts for told, facts in self.told if told == kind]

    def by_pool(self, kind: str, what: str, **facts: Any) -> None:
        """As a pool tells it."""
        self.incident(kind, what, facts)
