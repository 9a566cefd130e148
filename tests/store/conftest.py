"""Stores to test with: a folder, a bucket of the server of the tests, one of a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from rlhf_flows.store import ObjectStore, open_store
from tests.s3_server import FaultyS3, real_bucket

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def s3_fault(s3_server: FaultyS3) -> Iterator[Callable[..., None]]:
    """Switches on a fault of the server, for the next `times` conditional PUTs."""

    def switch(fault: str, *, times: int = 1_000_000) -> None:
        s3_server.fault, s3_server.faults_left = fault, times

    yield switch
    s3_server.fault = None


@pytest.fixture
def local_store(tmp_path: Path) -> ObjectStore:
    return open_store(tmp_path / "store")


@pytest.fixture
def s3_store(bucket: str) -> ObjectStore:
    return open_store(f"s3://{bucket}/some/{uuid4().hex}")


@pytest.fixture
def real_s3_store() -> Iterator[ObjectStore]:
    with real_bucket() as bucket:
        yield open_store(f"s3://{bucket}/some/folder")


@pytest.fixture(
    params=["local_store", "s3_store", pytest.param("real_s3_store", marks=pytest.mark.s3)]
)
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind of store in turn: what a test says of `store` holds for both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -c code arguments…`; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
