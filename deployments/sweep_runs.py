"""The runs of a sweep, started: here, one process each, or on a Prefect server, one flow run each.

The decision here: a run of a sweep is started as a person would start it, by `rlhf-flows train` or
by its deployment. Whatever becomes of one, the others have a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_flows.deployments.sweep import Point
from rlhf_flows.errors import ConfigError

__all__ = ["run_here", "submit"]

_TAIL_CHARACTERS = 2000


def run_here(
    recipe: str,
    points: Sequence[Point],
    *,
    file: Path | None,
    parallel: int,
    say: Callable[[str], None],
) -> list[str]:
    """Runs the points, `parallel` at a time; the names of those that failed.

    A single one at a time shows itself as `rlhf-flows train` does; of several, what a failed one
    said last is said.
    """

    def work(numbered: tuple[int, Point]) -> str | None:
        number, point = numbered
        words = "  ".join(f"{key}={value}" for key, value in point.settings.items())
        say(f"{number} of {len(points)}: {point.run}  {words}")
        code, tail = _train(recipe, point, file=file, quiet=parallel > 1)
        if code == 130:  # Ctrl-C, which all processes of the terminal were sent
            raise KeyboardInterrupt
        if code:
            say(f"{point.run} failed with exit code {code}; the others go on{tail}")
        return point.run if code else None

    with ThreadPoolExecutor(parallel) as pool:
        found = list(pool.map(work, enumerate(points, start=1)))
    return [run for run in found if run is not None]


def _train(recipe: str, point: Point, *, file: Path | None, quiet: bool) -> tuple[int, str]:
    command = [sys.executable, "-m", "rlhf_flows.cli", "train", recipe, *point.words]
    command += [f"run_name={point.run}", *([] if file is None else ["--config", str(file)])]
    if not quiet:
        return subprocess.run(command, check=False).returncode, ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        done = subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        return done.returncode, ":\n" + output.read()[-_TAIL_CHARACTERS:].strip()


def submit(
    client: Any, deployment: str, points: Sequence[Point], *, sweep: str, queue: str | None
) -> dict[str, str]:
    """Makes a flow run of the deployment for each point that has none under way.

    Args:
        client: Of the Prefect server, synchronous.
        queue: Work queue of the deployment's pool; its own by default.

    Returns:
        Run -> id of the flow run, of those that were made.

    Raises:
        ConfigError: the server has no such deployment or queue.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound as e:
        raise ConfigError(
            f"the Prefect server has no deployment {deployment!r}: deploy it (`prefect --no-prompt"
            " deploy --all` in the repository), or name another one with --deployment"
        ) from e
    if queue is not None:
        _check_queue(client, found.work_pool_name, queue)
    tag = f"sweep:{sweep}"
    busy = _under_way(client, tag)
    made = {}
    for point in points:
        if point.run in busy:
            continue
        flow_run = client.create_flow_run_from_deployment(
            found.id,
            name=point.run,
            parameters={"config": point.config.model_dump(mode="json", exclude_unset=True)},
            tags=[tag],
            work_queue_name=queue,
        )
        made[point.run] = str(flow_run.id)
    return made


def _check_queue(client: Any, pool: str | None, queue: str) -> None:
    known = sorted(q.name for q in client.read_work_queues(work_pool_name=pool))
    if queue not in known:
        raise ConfigError(
            f"the work pool {pool!r} has no queue {queue!r}, it has {', '.join(known)}: make it"
            f" with `prefect work-queue create {queue} --pool {pool} --priority 1`"
        )


def _under_way(client: Any, tag: str) -> set[str]:
    """Names of the flow runs with that tag that will still do something by themselves."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

    names: set[str] = set()
    offset = 0
    while True:
        page = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])),
            limit=200,
            offset=offset,
        )
        names |= {r.name for r in page if r.state is not None and not r.state.is_final()}
        if len(page) < 200:
            return names
        offset += len(page)
