"""A Ray head that lives until its standard input closes; says how to reach it."""

from __future__ import annotations

import asyncio
import os
import sys

from benchmarks.marks import mark
from rlhf_flows.config import ClusterConfig
from rlhf_flows.pools.cluster import connect, disconnect


def main() -> None:
    asyncio.run(connect(ClusterConfig(object_store_memory_bytes=200 << 20)))
    import ray

    token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    address = ray.get_runtime_context().gcs_address
    mark("head", environment={**token, "BENCH_RAY_ADDRESS": address})
    sys.stdin.read()
    disconnect()


if __name__ == "__main__":
    main()
