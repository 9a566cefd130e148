"""The Prefect server of a process that has none configured."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf_flows.services import prefect_server
from rlhf_flows.services.prefect_server import PrefectServer, end_events, kept_prefect_api


@pytest.fixture(autouse=True)
def none_configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept: list[PrefectServer] = []
    monkeypatch.setattr(prefect_server, "_kept", kept)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield
    for server in kept:
        server.stop()


def test_a_program_that_comes_again_finds_its_server_and_a_dead_one_is_replaced() -> None:
    with kept_prefect_api() as first:
        pass
    with kept_prefect_api() as again:
        assert again is first
    assert first is not None
    first.stop()
    with kept_prefect_api() as another:
        assert another is not None
        assert another is not first
        assert another.is_running


@pytest.mark.slow  # two servers
@pytest.mark.timeout(120)
def test_events_go_to_the_server_in_use_and_none_is_waited_for_that_nobody_takes() -> None:
    with kept_prefect_api() as first:
        assert first is not None
        first.wait()
        emit_event("toy", {"prefect.resource.id": "first"})
        _end_suddenly(first)
        for _ in range(200):  # 1.5 s each, for who insists
            emit_event("toy", {"prefect.resource.id": "nobody"})
    started = time.monotonic()
    with kept_prefect_api() as second, get_client(sync_client=True) as client:
        assert second is not None
        second.wait()
        emit_event("toy", {"prefect.resource.id": "second"})
        end_events(timeout_s=30)
        assert time.monotonic() - started < 60
        ids = [_id(event) for event in _events(client)]
        assert "second" in ids
        assert "nobody" not in ids


def _end_suddenly(server: PrefectServer) -> None:
    server._process.kill()
    server._process.wait()


def _events(client: SyncPrefectClient) -> list[dict[str, dict[str, str]]]:
    deadline = time.monotonic() + 30
    while True:  # they are written a moment after they are taken
        toys = {"filter": {"event": {"name": ["toy"]}}}
        answer = client.request("POST", "/events/filter", json=toys)
        events: list[dict[str, dict[str, str]]] = answer.json()["events"]
        if time.monotonic() > deadline or any(_id(event) == "second" for event in events):
            return events
        time.sleep(0.2)


@pytest.mark.timeout(60)
def test_a_server_that_cannot_be_started_is_an_error_for_who_asked_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuses)
        with pytest.raises(OSError, match="Cannot allocate memory"), kept_prefect_api():
            pass
    with kept_prefect_api() as server:
        assert server is not None
        assert server.is_running


def _id(event: dict[str, dict[str, str]]) -> str:
    return event["resource"]["prefect.resource.id"]
