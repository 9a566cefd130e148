"""A Prefect server as a user has it: that of other tests runs none of its background services."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from rlhf_flows.services.prefect_server import end_events
from tests.deployments.worker import POOL, kill_group, prefect, wait_for


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """Of a server of its own with a work pool; the environment names it while the module runs."""
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", url)
        try:
            wait_for("the server", lambda: _answers(url), timeout_s=120)
            with (
                temporary_settings({PREFECT_API_URL: url}),
                get_client(sync_client=True) as client,
            ):
                prefect("work-pool", "create", POOL, "--type", "process")
                yield client
        finally:
            end_events(timeout_s=30)  # of this process, which other tests go on with
            kill_group(server)


def _answers(url: str) -> bool | None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
