"""How fast weights get from a trainer into its followers, beside what Ray alone does.

    python -m benchmarks.sync [--quick] [--json FILE]

One trainer, then one and two replicas of a torch module and of vLLM, each in a process of one
thread. In turn: a param sync, and Ray's own put and get of the same bytes in objects of the same
size between two actors, where the receiver reads none of them. Figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import ray
from xxhash import xxh3_128

from benchmarks.machine import describe_machine, one_line
from benchmarks.models import build_model
from benchmarks.side import bench_folder
from benchmarks.sync.modules import Holder, TimedHolder, TimedVLLMPolicy
from rlhf_flows.config import ClusterConfig
from rlhf_flows.models import SFTTrainer, VLLMPolicy
from rlhf_flows.modules import BaseModule
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.pools import Pool, PoolSpec, connect, deliver
from rlhf_flows.pools.cluster import disconnect
from rlhf_flows.services.environment import prepare_environment

GB = 1e9
_DELETED_AFTER_S = 1.5
"""Ray deletes what is not used any more after a while."""
_WATCHED = 3
"""Syncs whose memory is looked at."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync")
    parser.add_argument("--megabytes", type=int, default=512, help="of the torch modules")
    parser.add_argument("--bucket-megabytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="64 MB, 3 rounds, a tiny vLLM model")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    if args.quick:
        args.megabytes, args.bucket_megabytes, args.rounds = 64, 8, 3
    prepare_environment()
    machine = describe_machine()
    print(one_line(machine), flush=True)
    rates = _rates()
    print(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()), flush=True)
    found = asyncio.run(_all(args))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rates": rates, "syncs": found}))


def _rates() -> dict[str, float]:
    """Of one thread of this process."""
    data = np.random.default_rng(0).integers(0, 255, 128 << 20, dtype=np.uint8)
    other = np.empty_like(data)

    def rate(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return data.nbytes / statistics.median(seconds) / GB

    return {
        "copy": rate(lambda: np.copyto(other, data)),
        "sha256": rate(lambda: hashlib.sha256(data.data).digest()),
        "xxh3": rate(lambda: xxh3_128(data.data).digest()),
    }


async def _all(args: argparse.Namespace) -> list[dict[str, Any]]:
    await connect(ClusterConfig(num_cpus=8, object_store_memory_bytes=1 << 30))
    found = []
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size, bucket_bytes = args.megabytes << 20, args.bucket_megabytes << 20
            trainer: BaseModule = Holder("trainer", num_bytes=size)
            follower = TimedHolder("torch", num_bytes=size, folder=folder)
            found += await _pair(trainer, follower, folder, bucket_bytes, args.rounds)
            if VLLMPolicy.available() and not args.no_vllm:
                model = "tiny" if args.quick else "small"
                path = build_model(model, bench_folder())
                sampler = TimedVLLMPolicy("vllm", path=path, folder=folder)
                bucket_bytes = (1 if args.quick else 16) << 20
                trainer = SFTTrainer("trainer", path=path)
                found += await _pair(trainer, sampler, folder, bucket_bytes, args.rounds)
    finally:
        disconnect()
    return found


async def _pair(
    trainer: BaseModule, follower: BaseModule, folder: Path, bucket_bytes: int, rounds: int
) -> list[dict[str, Any]]:
    trainer.attach(ModuleContext())
    packed = cloudpickle.dumps(trainer)
    trainer.setup()
    num_bytes = sum(tensor.nbytes for _, tensor in trainer.named_weights())
    trainer = cloudpickle.loads(packed)
    found = []
    for replicas in (1, 2):
        source, target = _pool(trainer, folder, 1), _pool(follower, folder, replicas)
        await asyncio.gather(source.open(), target.open())
        try:
            found.append(
                await _measure(
                    source,
                    target,
                    folder,
                    num_bytes=num_bytes,
                    bucket_bytes=bucket_bytes,
                    rounds=rounds,
                )
            )
        finally:
            source.release()
            target.release()
        _print(found[-1])
    return found


def _pool(module: BaseModule, folder: Path, replicas: int) -> Pool:
    spec = PoolSpec(
        run="sync",
        module=cloudpickle.dumps(module),
        module_name=module.name,
        store_url=str(folder / "store"),
        context=ModuleContext(),
        num_replica=replicas,
        digest=str(replicas),
    )
    return Pool(spec=spec, attempt=1, setup_timeout_s=300, max_restarts=0)


async def _measure(
    source: Pool, target: Pool, folder: Path, *, num_bytes: int, bucket_bytes: int, rounds: int
) -> dict[str, Any]:
    digests = await source.call("weights_digests", 1, what="digests", timeout_s=300)
    receivers = [(target, replica) for replica in target.replicas]
    plain: Any = ray.remote(_Plain)
    sender: Any = plain.remote()
    getters: list[Any] = [plain.remote() for _ in receivers]
    await sender.fill.remote(num_bytes, bucket_bytes)
    syncs, loads, alone, peaks = [], [], [], []

    async def sync() -> float:
        started = time.perf_counter()
        left = await deliver(
            source,
            receivers,
            version=0,
            bucket_bytes=bucket_bytes,
            average="",
            committed=digests[""],
            timeout_s=300,
        )
        seconds = time.perf_counter() - started
        assert not left
        await asyncio.sleep(_DELETED_AFTER_S)
        return seconds

    for number in range(rounds + 1):
        synced = await sync()
        started = time.perf_counter()
        refs = await sender.put.remote()
        await asyncio.gather(*(getter.get.remote(refs) for getter in getters))
        by_ray = time.perf_counter() - started
        del refs
        await sender.drop.remote()
        await asyncio.sleep(_DELETED_AFTER_S)
        if number:  # the first finds shared memory that nobody has touched
            syncs.append(synced)
            alone.append(by_ray)
            loads.append(
                max(float((folder / f"load-{i}").read_text()) for i in range(len(receivers)))
            )
    for _ in range(_WATCHED):  # apart: to look at the store keeps a core busy
        with _Usage() as usage:
            await sync()
        peaks.append((usage.most - usage.before) / bucket_bytes)
    for actor in (sender, *getters):
        ray.kill(actor)
    return {
        "follower": target.name,
        "replicas": len(receivers),
        "bytes": num_bytes,
        "bucket_bytes": bucket_bytes,
        "sync_s": syncs,
        "load_s": loads,
        "ray_s": alone,
        "peak_buckets": peaks,
    }


class _Plain:
    """Puts bytes, or gets them: Ray alone."""

    def fill(self, num_bytes: int, bucket_bytes: int) -> None:
        data = np.random.default_rng(0).integers(0, 255, num_bytes, dtype=np.uint8)
        self._parts = [data[i : i + bucket_bytes] for i in range(0, num_bytes, bucket_bytes)]

    def put(self) -> list[Any]:
        self._refs = [ray.put(part) for part in self._parts]
        return self._refs

    def drop(self) -> None:
        self._refs = []

    def get(self, refs: list[Any]) -> int:
        return sum(part.nbytes for part in ray.get(refs))


class _Usage:
    """The most that Ray's object store held, in bytes, looked at every 2 ms."""

    def __init__(self) -> None:
        (node,) = (n for n in ray.nodes() if n["Alive"])
        self._address = node["NodeManagerAddress"], node["NodeManagerPort"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.most = self._now()

    def _now(self) -> int:
        from ray._private.internal_api import node_stats

        return int(node_stats(*self._address, False).store_stats.object_store_bytes_used)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, self._now())

    def __enter__(self) -> _Usage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _print(found: dict[str, Any]) -> None:
    sync, alone, load = (statistics.median(found[k]) for k in ("sync_s", "ray_s", "load_s"))
    size = found["bytes"] / GB
    print(
        f"{found['follower']} x {found['replicas']}: {found['bytes'] / 2**20:.0f} MiB in buckets of"
        f" {found['bucket_bytes'] >> 20} MiB: sync {sync * 1e3:.0f} ms ({size / sync:.2f} GB/s),"
        f" of which loading {load * 1e3:.0f} ms; Ray's put and get {alone * 1e3:.0f} ms"
        f" ({size / alone:.2f} GB/s): {alone / sync:.0%} of it,"
        f" {alone / max(sync - load, 1e-9):.0%} without loading;"
        f" at most {max(found['peak_buckets']):.2f} buckets in Ray's store",
        flush=True,
    )


if __name__ == "__main__":
    main()
