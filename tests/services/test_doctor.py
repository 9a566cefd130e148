"""What the doctor says of a machine: each thing by what is really there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlhf_flows.services import doctor
from rlhf_flows.services.doctor import Line, examine


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes many seconds."""
    monkeypatch.setattr(doctor, "_vllm", lambda: Line(what="vLLM", state="ok", found="not asked"))


@pytest.mark.usefixtures("without_vllm")
def test_a_machine_that_runs_these_tests_can_run(tmp_path: Path) -> None:
    lines = {line.what: line for line in examine(store=str(tmp_path / "a/b/runs"))}
    assert {"Python", "torch", "ray", "prefect", "store", "GPU", "disk"} <= lines.keys()
    for name in ("Python", "torch", "ray", "prefect", "store"):
        assert lines[name].state != "wrong", lines[name]
    assert all(line.next_step for line in lines.values() if line.state != "ok")
    assert list(tmp_path.iterdir()) == []  # a look makes no folder


def test_a_store_that_cannot_be_written_is_wrong() -> None:
    assert doctor._store("/proc/runs").state == "wrong"
    assert "ftp" in doctor._store("ftp://x/y").found


def test_a_ray_head_answers_or_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert doctor._ray(address).state == "ok"
    line = doctor._ray(address)
    assert (line.state, "ray start --head" in line.next_step) == ("wrong", True)
    assert doctor._ray("nonsense").state == "wrong"


def test_packages_are_held_against_range_and_lock() -> None:
    assert doctor._package(Requirement("pytest"), None).state == "ok"
    other = doctor._package(Requirement("pytest"), "0.1")
    assert (other.state, "0.1 is what was tested" in other.next_step) == ("warning", True)
    assert doctor._package(Requirement("pytest<1"), None).state == "wrong"
    missing = doctor._package(Requirement("no-such-package-here>=2"), None)
    assert (missing.found, missing.next_step) == (
        "not installed",
        "pip install 'no-such-package-here>=2'",
    )


def test_a_server_that_does_not_answer_is_wrong() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert doctor._prefect().state == "wrong"


def test_the_server_that_is_configured_says_its_version(prefect_server: str) -> None:
    line = doctor._prefect()
    assert line.state == "ok"
    assert prefect_server in line.found


def test_little_room_is_told_before_none(tmp_path: Path) -> None:
    of = {
        (wanted, least): doctor._room("disk", tmp_path, wanted=wanted, least=least).state
        for wanted, least in ((1, 1), (1 << 60, 1), (1 << 60, 1 << 60))
    }
    assert list(of.values()) == ["ok", "warning", "wrong"]
