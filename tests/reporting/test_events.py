"""The table of events in docs/alerts.md, the code that emits them, and what they cost."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from rlhf_flows.services.event_names import FIELDS, FINISHED, INCIDENT, INCIDENTS, STARTED

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, tuple[str, ...]]:
    """Event -> fields, of the table."""
    text = (ROOT / "docs/alerts.md").read_text("utf-8")
    rows = re.findall(r"^\| `(rlhf-flows\.[a-z.-]+)` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    return {
        event: tuple(re.sub(r"`", "", field).strip() for field in fields.split(","))
        for event, fields in rows
    }


def test_the_page_and_the_code_name_the_same_events_with_the_same_fields() -> None:
    assert documented() == {event: tuple(fields) for event, fields in FIELDS.items()}
    assert set(FIELDS) == {STARTED, FINISHED, *(f"{INCIDENT}{kind}" for kind in INCIDENTS)}


def calls() -> list[tuple[str, set[str], bool]]:
    """(kind, keywords, whether more of them come by **) of all calls that tell of an incident."""
    found = []
    files = [*ROOT.glob("tasks/*.py"), *ROOT.glob("rlhf_flows/**/*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            is_of_pool = node.func.attr == "tell_incident"
            if not (is_of_pool or node.func.attr == "incident") or not node.args:
                continue
            kind = node.args[0]
            if isinstance(kind, ast.Constant):
                names = {k.arg for k in node.keywords if k.arg} | (
                    {"pool"} if is_of_pool else set()
                )
                found.append((str(kind.value), names, any(k.arg is None for k in node.keywords)))
    return found


def test_whoever_tells_of_an_incident_says_what_its_event_holds() -> None:
    told = calls()
    assert {kind for kind, _, _ in told} == INCIDENTS.keys() - {
        "reward-collapse", "kl-blow-up", "nan",  # alarms, by their own facts
    }  # fmt: skip
    for kind, names, has_more in told:
        wanted = set(FIELDS[f"{INCIDENT}{kind}"])
        if has_more:  # an episode or a version
            assert names == wanted - {"episode or version"}, kind
        else:
            assert names == wanted, kind
