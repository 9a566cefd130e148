"""`python -m tests.chaos --seeds 200 --first-seed 0`: the campaign, and its table."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests import conftest  # noqa: F401  sets the environment that tests run in


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="vLLM and the torch trainer, no toys")
    parser.add_argument("--json", type=Path, help="write the outcome of each seed, a line each")
    args = parser.parse_args()

    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    from rlhf_flows.config import ClusterConfig
    from rlhf_flows.pools.cluster import connect, disconnect
    from tests.chaos.campaign import Outcome, campaign, table

    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-flows-chaos-") as root,
        prefect_test_harness(server_startup_timeout=120),
    ):
        os.environ["PREFECT_API_URL"] = PREFECT_API_URL.value()
        asyncio.run(connect(ClusterConfig(num_cpus=8, object_store_memory_bytes=200 << 20)))
        import ray

        address = ray.get_runtime_context().gcs_address
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        try:
            for outcome in campaign(Path(root), seeds, address=address, real=args.real):
                outcomes.append(outcome)
                how = "exact" if not outcome.failure else f"NOT EXACT: {outcome.failure}"
                deaths = ", ".join(
                    f"{d.who} {d.where}{'' if happened else ' (not reached)'}"
                    for d, happened in zip(outcome.deaths, outcome.died, strict=False)
                )
                print(
                    f"{time.strftime('%H:%M:%S')} seed {outcome.seed}: {how}"
                    f" ({outcome.attempts} attempts, {outcome.seconds:.0f} s; {deaths})",
                    flush=True,
                )
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
        finally:
            disconnect()
    exact = sum(not o.failure for o in outcomes)
    print(f"\n{table(outcomes)}\n\n{exact} of {len(outcomes)} exact")
    return 0 if exact == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
