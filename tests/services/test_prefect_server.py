"""The Prefect server of a process that has none configured."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf_flows.services import prefect_server
from rlhf_flows.services.prefect_server import PrefectServer, kept_prefect_api


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
