"""What holds for every test: one compute thread, no network, a Prefect home of its own.

Set in the environment before any library is imported, so that child processes (Ray workers,
Prefect's server) get the same.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from hypothesis import settings

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
    "MPLBACKEND": "agg",
}
os.environ.update(_ENVIRONMENT)
os.environ.pop("PREFECT_API_URL", None)


# How long an example takes says more about what else runs on these cores than about the code.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)
