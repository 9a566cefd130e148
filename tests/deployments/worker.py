"""A process worker on a real server, and what a person does beside it on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.callables import ParameterSchema

ROOT = Path(__file__).parents[2]
POOL = "rlhf-flows"
T = TypeVar("T")


def prefect(*args: str, **env: str) -> str:
    """Runs Prefect's command line in the repository; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *args],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def process_worker(log: Path, pool: str = POOL) -> Iterator[subprocess.Popen[bytes]]:
    """A worker on a work pool; it and its flow processes end with the block.

    They make a process group, so that a test may kill them all at once.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool],
            cwd=log.parent,
            env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def deploy_toy(
    client: SyncPrefectClient,
    flow: str = "toy",
    *,
    tags: Sequence[str] = ("rlhf-flows",),
    form: ParameterSchema | None = None,
) -> UUID:
    """A deployment of a flow in `toy_flow`, as those of `prefect.yaml` are; a `form` is shown, and
    checks what a run is given.
    """
    return client.create_deployment(
        client.create_flow_from_name(flow),
        name=" ".join(("test", *tags)),
        entrypoint=f"tests.deployments.toy_flow.{flow}",
        work_pool_name=POOL,
        tags=list(tags),
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        job_variables={"working_dir": str(ROOT), "env": {"PYTHONPATH": str(ROOT)}},
        parameter_openapi_schema=None if form is None else form.model_dump_for_openapi(),
        enforce_parameter_schema=form is not None,
    )


def wait_for(what: str, ask: Callable[[], T | None], *, timeout_s: float = 300) -> T:
    """The first answer that is something."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (answer := ask()) is not None:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s:g} s")


def existing(path: Path) -> Path | None:
    return path if path.exists() else None


def in_state(client: SyncPrefectClient, flow_run_id: UUID, *types: str) -> FlowRun | None:
    flow_run = client.read_flow_run(flow_run_id)
    return flow_run if flow_run.state_type and flow_run.state_type.value in types else None


def history(client: SyncPrefectClient, flow_run_id: UUID) -> list[str]:
    """Names of the states that a flow run was in, in order."""
    states = client.read_flow_run_states(flow_run_id)
    return [s.name or "" for s in sorted(states, key=lambda s: s.timestamp)]


def wait_for_worker(client: SyncPrefectClient, flow_run_id: UUID, processes: int = 1) -> None:
    """Until a worker has said all that it says of the ends of so many processes of a flow run.

    A process that a signal ended it reports as crashed, twice, and the second report would end what
    a person began in between.
    """
    events = {
        "event": {"name": ["prefect.worker.executed-flow-run"]},
        "related": {"id": [f"prefect.flow-run.{flow_run_id}"]},
    }

    def said() -> bool | None:
        answer = client.request("POST", "/events/filter", json={"filter": events})
        return True if answer.json()["total"] >= processes else None

    wait_for("the worker's last word", said, timeout_s=120)


def attempt(folder: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"attempts/{number:06d}.json").read_text("utf-8"))
    return found


def outcome(folder: Path, number: int) -> str | None:
    """How an attempt says that it ended."""
    path = folder / f"attempts/{number:06d}.ended.json"
    return str(json.loads(path.read_text("utf-8"))["outcome"]) if path.exists() else None
