"""Modules on a cluster: what they ask for, whether it fits, their pools opened and released."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cloudpickle
import psutil

from rlhf_flows.attempt.description import Checked, Dataset
from rlhf_flows.attempt.shares import Share
from rlhf_flows.config import MAY_CHANGE, EngineConfig, default_threads
from rlhf_flows.errors import DataError, FencedError
from rlhf_flows.modules.base import BaseModule, ModuleContext
from rlhf_flows.modules.fingerprint import fingerprint
from rlhf_flows.pools import Cluster, Pool, PoolSpec, connect
from rlhf_flows.pools.resources import check_fits, num_gpus_here
from rlhf_flows.store import ObjectStore, check_fence
from rlhf_flows.together import together

__all__ = ["check_fits_here", "connect_cluster", "make_pool", "open_pools", "release_left"]

logger = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 20.0


def wanted_resources(shares: Mapping[str, Share]) -> dict[str, list[tuple[str, float]]]:
    """What each module reserves, by resource."""
    wanted: dict[str, list[tuple[str, float]]] = {"CPU": [], "GPU": [], "memory": []}
    for name, share in shares.items():
        wanted["CPU"].append((name, share.cpu_per_process * share.num_processes))
        wanted["GPU"].append((name, share.gpu_per_process * share.num_processes))
        wanted["memory"].append((name, share.memory_per_process * share.num_processes))
    return wanted


def check_fits_here(config: EngineConfig, shares: Mapping[str, Share]) -> None:
    """A local head offers this machine: what is more than that need not be started to be known."""
    have = {
        "CPU": float(config.cluster.num_cpus or default_threads()),
        "memory": float(psutil.virtual_memory().total),
    }
    wanted = wanted_resources(shares)
    if any(amount for _, amount in wanted["GPU"]):
        have["GPU"] = float(num_gpus_here())
    for resource, asks in wanted.items():
        if resource in have:
            check_fits(resource, asks, have=have[resource], where="this machine")


async def connect_cluster(checked: Checked) -> Cluster:
    """The cluster, which can hold what the modules ask for. Raises ResourcesError, PoolError."""
    cluster = await connect(checked.config.cluster)
    for resource, asks in wanted_resources(checked.shares).items():
        have = cluster.resources.get(resource, 0.0)
        check_fits(resource, asks, have=have, where=f"the cluster at {cluster.address}")
    return cluster


@contextlib.asynccontextmanager
async def open_pools(
    checked: Checked,
    store: ObjectStore,
    run: str,
    attempt: int,
    cluster: Cluster,
    *,
    resumes: bool,
    keeps: Callable[[BaseException], Awaitable[bool]],
) -> AsyncIterator[tuple[dict[str, Pool], dict[str, tuple[int, ...]]]]:
    """Opens every pool, keeps their lease, and releases what should not outlive the attempt.

    With the pools come the sizes of the datasets that their modules built, by kind.

    Args:
        resumes: The run has trained something before.
        keeps: Whether pools outlive an attempt that ends with this error.
    """
    pools = {
        name: make_pool(checked, store, run, attempt, name, resumes=resumes)
        for name in checked.opened
    }
    # From the first replica on: others may load for longer than a lease lasts.
    keeper = asyncio.create_task(_keep_lease(list(pools.values()), checked.config))
    kept = False
    try:
        async with together() as group:
            for pool in pools.values():
                group.create_task(pool.open())
        sizes = {
            kind: await _build_datasets(pools, kind, dataset)
            for kind, dataset in (("train", checked.dataset), ("eval", checked.eval_dataset))
            if dataset is not None
        }
        yield pools, sizes
    except BaseException as e:
        kept = await keeps(e)
        raise
    finally:
        keeper.cancel()
        if cluster.is_local or not kept:
            await _release(list(pools.values()))


async def release_left(
    checked: Checked, store: ObjectStore, run: str, attempt: int, cluster: Cluster
) -> None:
    """Ends the actors of a run that is finished: those of an attempt that was killed at its end."""
    if not cluster.is_local:
        await _release([make_pool(checked, store, run, attempt, name) for name in checked.modules])


async def _build_datasets(
    pools: Mapping[str, Pool], kind: str, dataset: Dataset
) -> tuple[int, ...]:
    info = dataset.info
    found = {}
    for owner in dataset.owners:
        found[owner] = await pools[owner].set_dataset(kind, info.digest, dataset.rows, info.parts)
    sizes = set(found.values())
    if len(sizes) > 1:
        raise DataError(
            "the modules of the trainer's flow made datasets of different sizes of the same rows"
            f" ({', '.join(f'{owner}: {sum(size)}' for owner, size in found.items())}): a batch"
            " takes the same items of each"
        )
    return sizes.pop()


def make_pool(
    checked: Checked,
    store: ObjectStore,
    run: str,
    attempt: int,
    name: str,
    *,
    resumes: bool = False,
) -> Pool:
    """The pool of one module, not open yet. `resumes`: the run has trained something before."""
    config, module = checked.config, checked.modules[name]
    model, share = config.for_model(name), checked.shares[name]
    threads = model.num_threads or module.default_threads or default_threads()
    context = ModuleContext(
        seed=config.runtime.seed,
        num_threads=threads,
        model_args=model.args_dict,
        module_args=model.model_dump(mode="json", exclude={"args_dict"}),
        runtime_args=config.runtime.model_dump(mode="json"),
        resumes=resumes,
    )
    is_trained = checked.trainer is not None and name in checked.trainer.modules
    relay = checked.description.relay if is_trained else None
    averages = {p.target: p.eta for p in checked.syncs if p.source == name and p.eta is not None}
    spec = PoolSpec(
        run=run,
        module=cloudpickle.dumps(module),
        module_name=name,
        store_url=store.url,
        context=context,
        num_replica=share.num_replica,
        ranks_per_replica=share.ranks_per_replica,
        num_gpu=share.gpu_per_process,
        num_cpu=share.cpu_per_process,
        memory_bytes=share.memory_per_process,
        is_spread=config.runtime.cpu_schedule_strategy == "SPREAD",
        runtime_env=config.runtime_env.for_ray(),
        num_threads=threads,
        lease_s=config.cluster.lease_s,
        store_retry_budget_s=config.store.retry_budget_s,
        collective_timeout_s=config.runtime.collective_timeout_s,
        averages=averages,
        relay=None if relay is None else cloudpickle.dumps(relay),
        works_beside=is_trained and config.runtime.max_staleness > 0,
        log_level=config.log_level,
    )
    return Pool(
        spec=replace(spec, digest=_making(spec, module, relay)),
        attempt=attempt,
        setup_timeout_s=config.runtime.setup_timeout_s,
        max_restarts=config.runtime.max_replica_restarts,
        check_fence=partial(check_fence, store, run, attempt),
    )


def _making(spec: PoolSpec, module: BaseModule, relay: Callable[[Any], Any] | None) -> str:
    """Digest of code, configuration and versions: what differs in it must be rebuilt."""
    digest = hashlib.sha256(module.fingerprint())
    digest.update(fingerprint(relay))
    runtime = {
        k: v for k, v in spec.context.runtime_args.items() if f"runtime.{k}" not in MAY_CHANGE
    }
    what = {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "threads": spec.num_threads,
        "ranks": spec.ranks_per_replica,
        "collective_timeout_s": spec.collective_timeout_s if spec.ranks_per_replica > 1 else None,
        "gpu": spec.num_gpu,
        "arguments": dict(spec.context.model_args),
        "runtime_env": dict(spec.runtime_env),
        "store": spec.store_url,
        "averages": dict(spec.averages),
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


async def _release(pools: Sequence[Pool]) -> None:
    """Ends all actors that are still this attempt's; waits for no head that answers no more."""

    def work() -> None:
        try:
            for pool in pools:
                pool.release()
        except FencedError as e:
            logger.info("%s: its pools are left to it", e)

    # A thread of our own, not of a pool: whatever becomes of it, the process may end.
    thread = threading.Thread(target=work, daemon=True, name="release")
    thread.start()
    await asyncio.to_thread(thread.join, _RELEASE_TIMEOUT_S)
    if thread.is_alive():
        logger.warning(
            "the pools were not released within %g s, because the head of the Ray cluster or the"
            " store does not answer: if the head still runs, `rlhf-flows pools release` ends them",
            _RELEASE_TIMEOUT_S,
        )


async def _keep_lease(pools: Sequence[Pool], config: EngineConfig) -> None:
    while True:
        await asyncio.sleep(config.cluster.lease_s / 4)
        for pool in pools:
            await pool.heartbeat()
