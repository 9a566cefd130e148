"""What holds for every test: one compute thread, no network, a Prefect home of its own.

Set in the environment before any library is imported, so that child processes (Ray workers,
Prefect's server) get the same. Whole runs share one Prefect server and one Ray head, which start
with the first test that asks for them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.s3_server import bucket, s3_server  # noqa: F401  fixtures for every room

_PREFECT_HOME = tempfile.mkdtemp(prefix="rlhf-flows-tests-prefect-")

_ENVIRONMENT = {
    # Several test processes share the cores; spinning threads would cost more than they bring.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing is downloaded and nothing is reported.
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Never the user's Prefect profile, server or database.
    "PREFECT_HOME": _PREFECT_HOME,
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "MPLBACKEND": "agg",
}
os.environ.update(_ENVIRONMENT)
os.environ.pop("PREFECT_API_URL", None)


# How long an example takes says more about what else runs on these cores than about the code.
settings.register_profile(
    "shared_cores", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared_cores")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """URL of a Prefect server with a database of its own, also in the environment of children."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        url = PREFECT_API_URL.value()
        assert url == SubprocessASGIServer().api_url
        os.environ["PREFECT_API_URL"] = url
        yield url
        del os.environ["PREFECT_API_URL"]


@pytest.fixture(scope="session")
def ray_head() -> Iterator[str]:
    """Address of a Ray head that this process started and is connected to.

    Processes that inherit this environment may connect as well: the token is in it.
    """
    from rlhf_flows.config import ClusterConfig
    from rlhf_flows.pools.cluster import connect, disconnect

    settings = ClusterConfig(num_cpus=8, object_store_memory_bytes=200 << 20)
    asyncio.run(connect(settings))
    import ray

    yield ray.get_runtime_context().gcs_address
    disconnect()


@pytest.fixture(scope="session")
def services(prefect_server: str, ray_head: str) -> str:
    """Both; the address of the Ray head."""
    return ray_head


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)
