"""What `rlhf-flows deploy` makes of a Prefect server: pool, queues, blocks, deployments, schedules.

The decision here: everything is read and compared first, into a list of changes; only then is
anything changed. So a wrong input changes nothing, a dry run is the same list, and a second call
finds nothing to do. What a person added by hand (schedules, tags, parameters, job variables, a
limit, another queue) stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from rlhf_flows.errors import ConfigError
from rlhf_flows.registry import import_object
from rlhf_flows.services.automations import TAG
from rlhf_flows.services.changes import Change
from rlhf_flows.services.deployed_parts import automation_changes, block_changes
from rlhf_flows.services.scheduling import Schedule, schedule_change

__all__ = ["ENVIRONMENT", "QUEUES", "Deployed", "Wanted", "apply", "plan"]

QUEUES = ("high", "default", "low")
"""Of the work pool, the first one served first."""
ENVIRONMENT: Mapping[str, str] = {
    # Threads that spin while they wait would take the cores from whoever computes.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    # Two lines a task run say less than one line an episode.
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "WARNING",
}
"""Of the processes of deployed runs."""
_SET_DIRECTORY = "prefect.deployments.steps.set_working_directory"


@dataclass(frozen=True)
class Deployed:
    """One deployment: FLOW/name, of a flow that stands in a module."""

    name: str
    entrypoint: str
    """`package.module.flow`: importable where the worker runs."""
    description: str
    import_folder: str | None = None
    """Goes onto the path of the runs: where the module lies, if it is not installed."""

    @property
    def module(self) -> str:
        return self.entrypoint.rpartition(".")[0]

    def flow(self) -> Any:
        """Imports it. Raises ConfigError."""
        return import_object(f"{self.module}:{self.entrypoint.rpartition('.')[2]}", what="flow")

    @cached_property
    def full_name(self) -> str:
        return f"{self.flow().name}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the server is to have."""

    deployments: Sequence[Deployed]
    directory: str
    """Where runs start, on the worker: relative paths of their parameters begin here."""
    work_pool: str = "rlhf-flows"
    limit: int | None = None
    """Runs of the pool at a time. None: 1 of a new pool, and whatever one that is there has."""
    queue: str | None = None
    """Of the deployments. None: "default" of new ones, and whatever those that are there have."""
    defaults: str | None = None
    """Name of a block of run defaults that all runs take."""
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    schedules: Sequence[Schedule] = ()
    with_automations: bool = True


def plan(client: SyncPrefectClient, wanted: Wanted) -> list[Change]:
    """What is to be done, in order; nothing is changed.

    Raises ConfigError for what cannot be done.
    """
    names = [d.full_name for d in wanted.deployments]
    if double := {n for n in names if names.count(n) > 1}:
        raise ConfigError(
            f"two deployments are called {sorted(double)[0]!r}: give your flow another name,"
            " `RECIPE.derived('my-name').flow()`"
        )
    for schedule in wanted.schedules:
        if schedule.deployment not in names:
            raise ConfigError(
                f"--schedule names {schedule.deployment!r}, which is not deployed here: deployed"
                f" are {', '.join(names)}"
            )
    found: list[Change] = []
    pool = _read_pool(client, wanted.work_pool)
    found += _pool_changes(client, wanted, pool)
    found += _queue_changes(client, wanted.work_pool, is_new=pool is None)
    found += block_changes(client, wanted.defaults)
    for deployed in wanted.deployments:
        there = _read_deployment(client, deployed.full_name)
        found.append(_deployment_change(client, wanted, deployed, there, pool))
        for schedule in wanted.schedules:
            if schedule.deployment == deployed.full_name:
                found.append(schedule_change(client, schedule, there))
    if wanted.with_automations:
        found += automation_changes(client)
    return found


def apply(changes: Sequence[Change]) -> None:
    """Does what is to be done."""
    for change in changes:
        if change.do is not None:
            change.do()


def _read_pool(client: SyncPrefectClient, name: str) -> WorkPool | None:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        return None


def _read_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _pool_changes(client: SyncPrefectClient, wanted: Wanted, pool: WorkPool | None) -> list[Change]:
    name, limit = wanted.work_pool, wanted.limit
    if pool is None:
        limit = limit or 1
        new = WorkPoolCreate(
            name=name,
            type=ProcessWorker.type,
            description="Runs of rlhf_flows; the limit is how many may use its GPUs at a time.",
            base_job_template=ProcessWorker.get_default_base_job_template(),
            concurrency_limit=limit,
        )
        create = partial(client.create_work_pool, new)
        said = f"process, {limit} at a time"
        return [Change(kind="work pool", name=name, outcome="created", detail=said, do=create)]
    if limit is None or limit == pool.concurrency_limit:
        said = f"{pool.type}, {pool.concurrency_limit or 'any number'} at a time"
        return [Change(kind="work pool", name=name, outcome="unchanged", detail=said)]
    update = partial(client.update_work_pool, name, WorkPoolUpdate(concurrency_limit=limit))
    said = f"{limit} at a time, before: {pool.concurrency_limit or 'any number'}"
    return [Change(kind="work pool", name=name, outcome="updated", detail=said, do=update)]


def _queue_changes(client: SyncPrefectClient, pool: str, *, is_new: bool) -> list[Change]:
    there = {} if is_new else {q.name: q.priority for q in client.read_work_queues(pool)}
    names = [f"{pool}/{queue}" for queue in QUEUES]
    ranks = [there.get(queue) for queue in QUEUES]
    known = [rank for rank in ranks if rank is not None]
    if len(known) == len(QUEUES) and known == sorted(known):
        return [Change(kind="work queue", name=n, outcome="unchanged") for n in names]
    changes = [
        Change(
            kind="work queue",
            name=name,
            outcome="created" if queue not in there else "updated",
            detail=f"priority {rank}",
        )
        for rank, (queue, name) in enumerate(zip(QUEUES, names, strict=True), 1)
    ]
    changes[-1] = replace(changes[-1], do=partial(_put_queues_in_order, client, pool))
    return changes


def _put_queues_in_order(client: SyncPrefectClient, pool: str) -> None:
    there = {q.name: q for q in client.read_work_queues(pool)}
    for queue in QUEUES:
        if queue not in there:
            there[queue] = client.create_work_queue(queue, work_pool_name=pool)
    # In this order: a queue that gets a priority moves those that had it, and all after, back.
    for rank, queue in enumerate(QUEUES, 1):
        client.update_work_queue(there[queue].id, priority=rank)


def _deployment_change(
    client: SyncPrefectClient,
    wanted: Wanted,
    deployed: Deployed,
    there: DeploymentResponse | None,
    pool: WorkPool | None,
) -> Change:
    name = deployed.full_name
    fields = _fields(wanted, deployed, there, pool)
    if there is None:
        fields["work_queue_name"] = wanted.queue or "default"

        def create() -> None:
            flow_id = client.create_flow_from_name(deployed.flow().name)
            client.create_deployment(flow_id, deployed.name, **fields)

        return Change(kind="deployment", name=name, outcome="created", do=create)
    if there.work_pool_name == wanted.work_pool:
        fields["work_queue_name"] = wanted.queue or there.work_queue_name
    else:
        fields["work_queue_name"] = wanted.queue or "default"
    differing = {n: v for n, v in fields.items() if getattr(there, n) != v}
    if not differing:
        return Change(kind="deployment", name=name, outcome="unchanged")
    detail = ", ".join(sorted(differing))
    if differing.keys() & {"work_pool_name", "work_queue_name"}:
        differing |= {n: fields[n] for n in ("work_pool_name", "work_queue_name")}
    update = partial(client.update_deployment, there.id, DeploymentUpdate(**differing))
    return Change(kind="deployment", name=name, outcome="updated", detail=detail, do=update)


def _fields(
    wanted: Wanted,
    deployed: Deployed,
    there: DeploymentResponse | None,
    pool: WorkPool | None,
) -> dict[str, Any]:
    """The fields of the deployment, those that a person added to it among them."""
    tags = {TAG, *(there.tags if there else ())}
    before = dict(there.job_variables) if there else {}
    is_local = pool is None or pool.type == ProcessWorker.type
    if is_local and before.get("working_dir") in (None, _directory(there)):
        # Without it a process starts in a folder that its worker removes with the process before:
        # a flow run that is retried while that one is still on its way out would stand in nothing.
        before["working_dir"] = wanted.directory
    environment = {**(before.get("env") or {}), **ENVIRONMENT}
    if deployed.import_folder is not None:
        environment["PYTHONPATH"] = deployed.import_folder
    parameters = dict(there.parameters) if there else {}
    if wanted.defaults is not None:
        parameters["defaults"] = wanted.defaults
    return {
        "description": deployed.description,
        "entrypoint": deployed.entrypoint,
        "tags": sorted(tags) if there is None or set(there.tags) != tags else there.tags,
        "parameters": parameters,
        "job_variables": {**before, **wanted.job_variables, "env": environment},
        "work_pool_name": wanted.work_pool,
        "parameter_openapi_schema": parameter_schema(deployed.flow()).model_dump(mode="json"),
        "enforce_parameter_schema": True,
        "pull_steps": [{_SET_DIRECTORY: {"directory": wanted.directory}}],
    }


def _directory(there: DeploymentResponse | None) -> str | None:
    """Where runs of the deployment start until now."""
    for step in (there.pull_steps if there else None) or ():
        if _SET_DIRECTORY in step:
            return str(step[_SET_DIRECTORY].get("directory"))
    return None
