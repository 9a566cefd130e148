"""From an engine's description to a running attempt, the cheap checks first.

In this order: trace the flows, check modules and data in this process, open the store and take an
attempt, connect to Ray, open the pools, scan what is there, run. Whatever a user can get wrong is
said before the first actor starts. On the way out the attempt is ended and, where they cannot
outlive it or the run is done, the pools are released.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import prefect
import psutil
from prefect.context import FlowRunContext

from rlhf_flows.artifacts import shown
from rlhf_flows.config import MAY_CHANGE, EngineConfig, default_threads
from rlhf_flows.data.rows import load_rows, rows_digest
from rlhf_flows.errors import (
    ConfigError,
    DataError,
    FencedError,
    StoreError,
    StoreUnavailableError,
    UserError,
)
from rlhf_flows.flow import RunResult, is_finished, run_episodes
from rlhf_flows.graph import BATCH, Graph, phases, trace
from rlhf_flows.modules.base import BaseModule, ModuleContext
from rlhf_flows.pools.resources import check_fits
from rlhf_flows.store import (
    ObjectStore,
    RunRecord,
    check_fence,
    check_run_name,
    end_attempt,
    open_run,
    open_store,
    probe_put_if_absent,
    scan,
    take_attempt,
)
from rlhf_flows.tasks.runtime import DatasetInfo, Runtime, SyncPair

if TYPE_CHECKING:
    from rlhf_flows.engine import Description
    from rlhf_flows.pools import Cluster, Pool, PoolSpec

__all__ = [
    "Checked",
    "check",
    "check_store",
    "new_run_name",
    "open_probed_store",
    "run_as_flow",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows of a dataset, and which modules build them."""

    rows: Sequence[Any]
    info: DatasetInfo
    owners: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A description that was found sound."""

    description: Description
    environment: Graph | None
    trainer: Graph | None
    evaluator: Graph | None
    rollout: frozenset[int]
    scoring: frozenset[int]
    syncs: tuple[SyncPair, ...]
    modules: Mapping[str, BaseModule]
    dataset: Dataset | None
    eval_dataset: Dataset | None

    @property
    def config(self) -> EngineConfig:
        return self.description.config


# ---- checks that need no cluster --------------------------------------------------------------


def check(description: Description) -> Checked:
    """Everything that can be known to be wrong before anything starts.

    Raises:
        UserError: names what is wrong, where, and what to do.
    """
    parts = (description.environment, description.trainer, description.evaluator)
    environment, trainer, evaluator = (None if p is None else trace(p.flow) for p in parts)
    modules = _modules([g for g in (environment, trainer, evaluator) if g is not None])
    rollout, scoring = (
        (frozenset[int](), frozenset[int]()) if environment is None else phases(environment)
    )
    _check_names(description.config, modules)
    _check_syncs(description.syncs, modules, trainer)
    if trainer is not None:
        _check_trainer(trainer, description.config)
    if description.config.cluster.address is None:
        _check_fits_here(description.config, modules)
    for module in modules.values():
        module.validate()
    dataset = eval_dataset = None
    if description.environment is not None and environment is not None and trainer is not None:
        first = [n for n in environment.nodes if n.id in (rollout or scoring) and BATCH in n.inputs]
        owners = (first[0].module,)  # the others take the rows from its shards
        dataset = _dataset(description.environment.dataset, owners, modules, is_eval=False)
    elif description.trainer is not None and trainer is not None:
        owners = tuple(n.module for n in trainer.nodes)
        dataset = _dataset(description.trainer.dataset, owners, modules, is_eval=False)
    if description.evaluator is not None and evaluator is not None:
        owners = (evaluator.nodes[0].module,)
        eval_dataset = _dataset(description.evaluator.dataset, owners, modules, is_eval=True)
    return Checked(
        description=description,
        environment=environment,
        trainer=trainer,
        evaluator=evaluator,
        rollout=rollout,
        scoring=scoring,
        syncs=description.syncs,
        modules=modules,
        dataset=dataset,
        eval_dataset=eval_dataset,
    )


def _modules(graphs: Sequence[Graph]) -> dict[str, BaseModule]:
    modules: dict[str, BaseModule] = {}
    for graph in graphs:
        for name, module in graph.modules.items():
            assert isinstance(module, BaseModule)
            if modules.setdefault(name, module) is not module:
                raise ConfigError(
                    f"two modules are named {name!r}, in different flows of one engine: a name is"
                    " a model's identity, so give one of them another"
                )
    return modules


def _check_names(config: EngineConfig, modules: Mapping[str, BaseModule]) -> None:
    for name in modules:
        try:
            check_run_name(name)
        except ConfigError as e:
            raise ConfigError(f"a module cannot be named {name!r}: use letters and digits") from e
    unknown = sorted(set(config.models) - set(modules))
    if unknown:
        raise ConfigError(
            f"models.{unknown[0]} is configured, but no flow calls a module of that name: the"
            f" engine's modules are {', '.join(sorted(modules))}"
        )


def _wanted(
    config: EngineConfig, modules: Mapping[str, BaseModule]
) -> dict[str, list[tuple[str, float]]]:
    """What each module reserves, by resource."""
    wanted: dict[str, list[tuple[str, float]]] = {"CPU": [], "GPU": [], "memory": []}
    for name in modules:
        model = config.for_model(name)
        ranks = model.num_replica * model.ranks_per_replica
        wanted["CPU"].append((name, model.num_cpu * ranks))
        wanted["GPU"].append((name, model.num_gpu * ranks))
        wanted["memory"].append((name, model.memory_bytes * ranks))
    return wanted


def _check_fits_here(config: EngineConfig, modules: Mapping[str, BaseModule]) -> None:
    """A local head offers this machine: what is more than that need not be started to be known."""
    have = {
        "CPU": float(config.cluster.num_cpus or default_threads()),
        "memory": float(psutil.virtual_memory().total),
    }
    for resource, asks in _wanted(config, modules).items():
        if resource in have:
            check_fits(resource, asks, have=have[resource], where="this machine")


def _check_syncs(
    syncs: Sequence[SyncPair], modules: Mapping[str, BaseModule], trainer: Graph | None
) -> None:
    trained = set() if trainer is None else {n.module for n in trainer.nodes}
    for pair in syncs:
        for name in (pair.source, pair.target):
            if name not in modules:
                raise ConfigError(
                    f"set_parameter_sync names {name!r}, which no flow of the engine calls: its"
                    f" modules are {', '.join(sorted(modules))}"
                )
        if pair.source not in trained:
            raise ConfigError(
                f"set_parameter_sync takes weights from {pair.source!r}, which the trainer's flow"
                f" does not train: it trains {', '.join(sorted(trained)) or 'nothing'}"
            )
    targets = [pair.target for pair in syncs]
    for name in targets:
        if targets.count(name) > 1:
            raise ConfigError(f"{name!r} follows two trainers: a module takes weights of one")


def _check_trainer(graph: Graph, config: EngineConfig) -> None:
    for node in graph.nodes:
        if node.inputs != (BATCH,):
            raise ConfigError(
                f"{node.label} of the trainer's flow takes another call's output: a trainer flow"
                " calls each module with the batch itself"
            )
        if config.for_model(node.module).num_replica > 1:
            raise ConfigError(
                f"models.{node.module}.num_replica is"
                f" {config.for_model(node.module).num_replica}, but it is trained: a trained"
                " module has one replica, with data-parallel ranks inside (ranks_per_replica)"
            )
    names = [n.module for n in graph.nodes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the trainer's flow calls {name!r} twice: one step a batch")


def _dataset(
    source: Any, owners: tuple[str, ...], modules: Mapping[str, BaseModule], *, is_eval: bool
) -> Dataset:
    kind = "evaluator's" if is_eval else "engine's"
    if source is None:
        raise ConfigError(f"the {kind} dataset is missing: give it one with set_dataset(rows)")
    rows = load_rows(source) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise DataError(f"the {kind} dataset is empty: give it at least one row")
    for owner in owners:
        modules[owner].validate_rows(rows, is_eval=is_eval)
    info = DatasetInfo(num_rows=len(rows), digest=rows_digest(rows))
    return Dataset(rows=rows, info=info, owners=owners)


# ---- the attempt ------------------------------------------------------------------------------


async def run_as_flow(description: Description) -> RunResult:
    """Runs as a Prefect flow run, or as part of the flow run that this is called in."""
    checked = await asyncio.to_thread(check, description)
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        return await _run(checked, flow_run_id=str(context.flow_run.id))

    run = description.config.run_name or new_run_name(description.name)
    config = description.config.model_copy(update={"run_name": run})
    checked = replace(checked, description=replace(description, config=config))
    # A name that is taken, or a store that cannot be written, is known before anything starts.
    await asyncio.to_thread(_open_run, checked, run)
    # The cluster starts while Prefect does.
    cluster = asyncio.create_task(_connect(checked))

    @prefect.flow(name=description.name, flow_run_name=run, persist_result=False)
    async def episodes() -> RunResult:
        """The five phases, episode by episode."""
        await cluster
        flow_run = FlowRunContext.get()
        assert flow_run is not None
        assert flow_run.flow_run is not None
        return await _run(checked, flow_run_id=str(flow_run.flow_run.id))

    try:
        result: RunResult = await episodes()
    finally:
        cluster.cancel()
    return result


def new_run_name(recipe: str) -> str:
    """A name that sorts by time, for a run that was given none."""
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


async def _connect(checked: Checked) -> Cluster:
    from rlhf_flows.pools import connect  # Ray: only where a cluster is about to be used

    cluster = await connect(checked.config.cluster)
    for resource, asks in _wanted(checked.config, checked.modules).items():
        have = cluster.resources.get(resource, 0.0)
        check_fits(resource, asks, have=have, where=f"the cluster at {cluster.address}")
    return cluster


async def _run(checked: Checked, *, flow_run_id: str) -> RunResult:
    config = checked.config
    run = check_run_name(config.run_name or f"{checked.description.name}-{flow_run_id}")
    store, record = await asyncio.to_thread(_open_run, checked, run)
    cluster = await _connect(checked)
    attempt = await asyncio.to_thread(
        take_attempt,
        store,
        run,
        flow_run_id=flow_run_id,
        changed=record.changed,
        takeover=checked.description.takeover,
    )
    if checked.description.progress is not None:
        checked.description.progress.begin(run, config.runtime.num_episode)

    async def runtime(pools: Mapping[str, Pool]) -> Runtime:
        return Runtime(
            config=config,
            run=run,
            attempt=attempt.number,
            store=store,
            state=await asyncio.to_thread(scan, store, run),
            pools=pools,
            environment=checked.environment,
            rollout_nodes=checked.rollout,
            scoring_nodes=checked.scoring,
            trainer=checked.trainer,
            evaluator=checked.evaluator,
            syncs=checked.syncs,
            dataset=None if checked.dataset is None else checked.dataset.info,
            eval_dataset=None if checked.eval_dataset is None else checked.eval_dataset.info,
        )

    outcome = "failed"
    try:
        found = await runtime({})
        name, also = checked.description.name, checked.description.progress
        async with shown(found, name=name, flow_run_id=flow_run_id, also=also) as progress:
            if is_finished(found):
                found.progress = progress
                result = await run_episodes(found)
            else:
                async with _pools(checked, store, run, attempt.number, cluster) as pools:
                    # Looked at again, after the pools are claimed: what an older attempt had in
                    # flight is there now.
                    working = await runtime(pools)
                    working.progress = progress
                    result = await run_episodes(working)
        outcome = "completed"
        return replace(result, flow_run_id=flow_run_id)
    except FencedError:
        outcome = "fenced"
        raise
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    finally:
        await asyncio.shield(asyncio.to_thread(end_attempt, store, run, attempt.number, outcome))


def check_store(checked: Checked) -> None:
    """Whether the store can be used, and the run's name is free or of this configuration."""
    if checked.config.run_name is None:
        open_probed_store(checked.config)
    else:
        _open_run(checked, check_run_name(checked.config.run_name))


def open_probed_store(config: EngineConfig) -> ObjectStore:
    """The store, which holds its promise. Raises ConfigError, StoreProbeError."""
    try:
        store = open_store(config.store.url)
    except StoreUnavailableError:
        raise
    except StoreError as e:
        raise ConfigError(f"store.url cannot be used: {e}") from e
    if not config.store.single_writer:
        probe_put_if_absent(store)
    return store


def _open_run(checked: Checked, run: str) -> tuple[ObjectStore, RunRecord]:
    """The store, probed, and the run in it: new, or one of the same configuration."""
    store = open_probed_store(checked.config)
    identity, may_change = _identity(checked), _may_change(checked)
    return store, open_run(store, run, config=identity, may_change=may_change)


def _identity(checked: Checked) -> dict[str, Any]:
    """What makes two starts the same run."""
    return {
        "recipe": checked.description.name,
        **checked.config.model_dump(mode="json", exclude={"run_name", "models"}),
        # Said or not, a module's placement is the same.
        "models": {
            name: checked.config.for_model(name).model_dump(mode="json") for name in checked.modules
        },
        "flows": {
            part: [n.label for n in graph.nodes]
            for part, graph in (
                ("environment", checked.environment),
                ("trainer", checked.trainer),
                ("evaluator", checked.evaluator),
            )
            if graph is not None
        },
    }


def _may_change(checked: Checked) -> frozenset[str]:
    names = set()
    for field in MAY_CHANGE:
        names |= {field.replace("*", name) for name in checked.modules}
    return frozenset(names)


# ---- pools ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _pools(
    checked: Checked, store: ObjectStore, run: str, attempt: int, cluster: Cluster
) -> AsyncIterator[dict[str, Pool]]:
    """Opens every pool, keeps their lease, and releases what should not outlive the attempt."""
    import ray

    pools = {name: _pool(checked, store, run, attempt, name) for name in checked.modules}
    keeper: asyncio.Task[None] | None = None
    done = False
    try:
        await _all_or_first_error([pool.open() for pool in pools.values()])
        for kind, dataset in (("train", checked.dataset), ("eval", checked.eval_dataset)):
            if dataset is not None:
                rows = ray.put(list(dataset.rows))
                for owner in dataset.owners:
                    await pools[owner].set_dataset(kind, dataset.info.digest, rows)
        keeper = asyncio.create_task(_keep_lease(list(pools.values()), checked.config))
        yield pools
        done = True
    except UserError:
        done = True  # waiting with loaded models for the same mistake helps nobody
        raise
    finally:
        if keeper is not None:
            keeper.cancel()
        if done or cluster.is_local:
            for pool in pools.values():
                pool.release()


def _pool(checked: Checked, store: ObjectStore, run: str, attempt: int, name: str) -> Pool:
    from rlhf_flows.pools import Pool, PoolSpec  # Ray

    config, module = checked.config, checked.modules[name]
    model = config.for_model(name)
    threads = model.num_threads or module.default_threads or default_threads()
    context = ModuleContext(
        seed=config.runtime.seed,
        num_threads=threads,
        model_args=model.model_dump(mode="json"),
        runtime_args=config.runtime.model_dump(mode="json"),
    )
    spec = PoolSpec(
        run=run,
        module=cloudpickle.dumps(module),
        module_name=name,
        store_url=store.url,
        context=context,
        num_replica=model.num_replica,
        ranks_per_replica=model.ranks_per_replica,
        num_gpu=model.num_gpu,
        num_cpu=model.num_cpu,
        memory_bytes=model.memory_bytes,
        num_threads=threads,
        lease_s=config.cluster.lease_s,
        log_level=config.log_level,
    )
    return Pool(
        spec=replace(spec, digest=_making(spec, module)),
        attempt=attempt,
        setup_timeout_s=config.runtime.setup_timeout_s,
        max_restarts=config.runtime.max_replica_restarts,
        check_fence=partial(check_fence, store, run, attempt),
    )


def _making(spec: PoolSpec, module: BaseModule) -> str:
    """Digest of code, configuration and versions: what differs in it must be rebuilt."""
    digest = hashlib.sha256(module.fingerprint())
    runtime = {k: v for k, v in spec.context.runtime_args.items() if k != "num_episode"}
    what = {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "threads": spec.num_threads,
        "ranks": spec.ranks_per_replica,
        "gpu": spec.num_gpu,
        "store": spec.store_url,
        "runtime": runtime,
        "versions": {p: _version(p) for p in ("rlhf-flows", "torch", "transformers", "vllm")},
    }
    digest.update(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


async def _all_or_first_error(work: Sequence[Any]) -> None:
    from rlhf_flows.tasks.dispatch import together

    async with together() as group:
        for one in work:
            group.create_task(one)


async def _keep_lease(pools: Sequence[Pool], config: EngineConfig) -> None:
    while True:
        await asyncio.sleep(config.cluster.lease_s / 4)
        for pool in pools:
            await pool.heartbeat()
