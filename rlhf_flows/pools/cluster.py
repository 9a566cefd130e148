"""Reaching the Ray cluster: a local head that ends with this process, or one that runs already.

The decision here: token authentication is always on, since Ray's control service listens on every
interface. A local head gets a token of its own, in memory only; a running one is reached with the
token that the environment names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import psutil
import ray

from rlhf_flows.config import ClusterConfig, default_threads
from rlhf_flows.errors import PoolError

__all__ = ["Cluster", "connect", "watch_head"]

_CONNECT_TIMEOUT_S = 120.0
_HEAD_SILENCE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A connection to Ray."""

    is_local: bool
    """Whether the head was started by this process and ends with it."""
    address: str
    """As messages name it."""
    gcs_address: str = ""
    """`host:port` of the head's control service."""
    resources: Mapping[str, float] = field(default_factory=dict)


async def connect(config: ClusterConfig) -> Cluster:
    """Connects this process to Ray, starting a local head where no address is configured.

    A process has one connection: a second call returns the same cluster.

    Raises:
        PoolError: no head answers at the address, or the local one does not start.
    """
    if ray.is_initialized():
        return _connected(is_local=config.address is None)
    started = time.monotonic()
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await _in_lasting_thread(partial(_init, config))
    except TimeoutError as e:
        raise PoolError(
            f"no connection to Ray ({config.address or 'local'}) within {_CONNECT_TIMEOUT_S:g} s:"
            " check cluster.address and that the head runs"
        ) from e
    except (ConnectionError, ray.exceptions.RaySystemError, ValueError, RuntimeError) as e:
        raise PoolError(
            f"no connection to Ray ({config.address or 'a local head'}) after"
            f" {time.monotonic() - started:.0f} s: {str(e).strip().splitlines()[-1]}. Check"
            " cluster.address, that the head runs, and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            " holds its token"
        ) from e
    return _connected(is_local=config.address is None)


async def _in_lasting_thread(work: Callable[[], None]) -> None:
    """Runs `work` in a thread that stays for as long as this process does.

    The processes of a local head die with the thread that started them: Linux delivers a parent's
    death at the end of the thread that forked. A thread of an event loop's pool ends with the loop.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as e:
            error = e
        with contextlib.suppress(RuntimeError):  # the loop that asked is closed: it gave up
            loop.call_soon_threadsafe(finish, error)
        if error is None:
            threading.Event().wait()

    threading.Thread(target=run, daemon=True, name="ray-head").start()
    await done


def _authenticate(*, is_local: bool) -> None:
    if "RAY_AUTH_MODE" in os.environ:
        return  # asked for, or done by an earlier call
    if is_local and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray reads the mode when it is imported, which may be long ago; it refreshes it the same way.
    ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # compiled, not annotated


def _init(config: ClusterConfig) -> None:
    _authenticate(is_local=config.address is None)
    common: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": True,
    }
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.address is not None:
        ray.init(address=config.address, **common)
        return
    free = psutil.virtual_memory().available
    ray.init(
        address="local",
        num_cpus=config.num_cpus or default_threads(),
        object_store_memory=min(config.object_store_memory_bytes, free // 4),
        include_dashboard=False,
        _system_config={
            # Workers started in advance fit no actor of ours: each has its own environment.
            "prestart_worker_first_driver": False,
            # At once, where Ray waits for a hundred objects or a second: buckets of weights that
            # are done with would fill its store.
            "free_objects_batch_size": 1,
        },
        **common,
    )


def _connected(*, is_local: bool) -> Cluster:
    gcs_address = ray.get_runtime_context().gcs_address
    return Cluster(
        is_local=is_local,
        address="the local head" if is_local else gcs_address,
        gcs_address=gcs_address,
        resources=ray.cluster_resources(),
    )


async def watch_head(cluster: Cluster) -> NoReturn:
    """Returns never; raises PoolError when the head has been gone for a while.

    Ray itself waits for a minute and then ends the process, without a word to who called it.
    """
    host, _, port = cluster.gcs_address.rpartition(":")
    answered = time.monotonic()
    while True:
        try:
            async with asyncio.timeout(_HEAD_SILENCE_S / 3):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            answered = time.monotonic()
        except (OSError, TimeoutError) as e:
            silence_s = time.monotonic() - answered
            if silence_s > _HEAD_SILENCE_S:
                raise PoolError(
                    f"the head of the Ray cluster at {cluster.gcs_address} is gone: no answer for"
                    f" {silence_s:.0f} s. The actors are lost with it; start it again, then this"
                    " run by the same name, and it goes on from what is stored"
                ) from e
        await asyncio.sleep(_HEAD_SILENCE_S / 6)


def disconnect() -> None:
    """Ends the connection; a local head ends with it."""
    with contextlib.suppress(Exception):  # Ray raises various things while its head goes away.
        ray.shutdown()
