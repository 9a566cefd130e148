"""`python -m tests.chaos --seeds 200 --first-seed 0`: the campaign, and its table.

With `--tally FILE`, the table of the outcomes in a file that one or several campaigns wrote.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests import conftest  # noqa: F401  sets the environment that tests run in
from tests.chaos.campaign import Death, Outcome, table
from tests.chaos.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    for name, of in KINDS.items():
        kind.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=of.what)
    parser.set_defaults(kind="toys")
    parser.add_argument("--json", type=Path, help="write the outcome of each seed, a line each")
    parser.add_argument("--tally", type=Path, help="only show the table of such a file")
    args = parser.parse_args()
    if args.tally:
        return _conclude([_outcome(line) for line in args.tally.read_text().splitlines()])

    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    from rlhf_flows.config import ClusterConfig
    from rlhf_flows.pools.cluster import connect, disconnect
    from tests.chaos.campaign import campaign

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
            for outcome in campaign(Path(root), seeds, address=address, kind=args.kind):
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
    return _conclude(outcomes)


def _outcome(line: str) -> Outcome:
    fields = json.loads(line)
    deaths = [Death(**death) for death in fields.pop("deaths")]
    return Outcome(deaths=deaths, **fields)


def _conclude(outcomes: Sequence[Outcome]) -> int:
    exact = sum(not o.failure for o in outcomes)
    print(f"\n{table(outcomes)}\n\n{exact} of {len(outcomes)} exact")
    return 0 if exact == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
