"""What an episode costs beside its models: seconds, layer by layer.

    python -m benchmarks.overhead [--quick] [--json FILE]

Runs the same episodes with one layer less each time, each variant in a process of its own, the
whole ladder several times. The modules do nearly nothing (`modules.py`), on shards and weights of
real size. Figures are medians over all episodes but the first two, of wall time and of CPU time of
the whole process tree: the second holds on a busy machine, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.cpu_clock import CpuTree, Reading
from benchmarks.machine import describe_machine, one_line
from benchmarks.marks import read_mark
from rlhf_flows.services.environment import prepare_environment

VARIANTS = ("flow", "ray", "disk", "memory", "plain")
"""As in `variants.py`, which imports Prefect; this process does not."""
REMOVED = {
    "flow": "Prefect: flow, tasks, states, artifacts",
    "ray": "Ray: calls, processes, shared memory",
    "disk": "disk: syncs of shards, commits, checkpoints",
    "memory": "our own work: Arrow, Parquet, digests, records",
}
TARGET_MS = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few episodes")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    episodes, rounds = (8, 1) if args.quick else (args.episodes, args.rounds)
    machine = describe_machine()
    print(one_line(machine), flush=True)
    wall: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name in VARIANTS:
            wall_ms, cpu_ms, parts[name] = _run(name, episodes)
            wall[name] += wall_ms
            cpu[name] += cpu_ms
            print(
                f"  {name:7} {statistics.median(wall_ms):7.1f} ms,"
                f" {statistics.median(cpu_ms):7.1f} CPU-ms, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    _print_table(
        {name: statistics.median(values) for name, values in wall.items()},
        {name: statistics.median(values) for name, values in cpu.items()},
        parts["memory"],
    )
    if args.json:
        measured = {"machine": machine, "wall_ms": wall, "cpu_ms": cpu, "parts": parts}
        args.json.write_text(json.dumps(measured, indent=1))


def _run(name: str, episodes: int) -> tuple[list[float], list[float], dict[str, float]]:
    """Wall and CPU milliseconds of each episode after the first two; seconds of methods."""
    command = [sys.executable, "-m", "benchmarks.overhead.variants", name, str(episodes)]
    prepare_environment()  # as the command line does
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    readings: list[Reading] = []
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        environment["PREFECT_HOME"] = folder
        with CpuTree(command, env=environment, errors=errors) as tree:
            for line in tree.lines():
                found = read_mark(line) or {}
                if found.get("kind") == "episode":
                    readings.append(tree.read())
                parts = found.get("parts", parts)
            code = tree.process.wait()
        if code != 0 or len(readings) != episodes + 1:
            sys.exit(f"variant {name} ended with {code}:\n{errors.read_text()[-4000:]}")
    pairs = list(itertools.pairwise(readings[2:]))
    wall_ms = [1000 * (b.at_s - a.at_s) for a, b in pairs]
    return wall_ms, [1000 * (b.cpu_s - a.cpu_s) for a, b in pairs], parts


def _print_table(wall: dict[str, float], cpu: dict[str, float], parts: dict[str, float]) -> None:
    print("\n| what | ms an episode | CPU-ms an episode |\n|---|---|---|")
    print(f"| everything | {wall['flow']:.1f} | {cpu['flow']:.1f} |")
    for name, below in itertools.pairwise(VARIANTS):
        less = wall[name] - wall[below], cpu[name] - cpu[below]
        print(f"| … {REMOVED[name]} | {less[0]:.1f} | {less[1]:.1f} |")
    print(f"| … the modules, called by a script | {wall['plain']:.1f} | {cpu['plain']:.1f} |")
    overhead = wall["flow"] - wall["plain"]
    print(f"\noverhead {overhead:.0f} ms an episode (target: at most {TARGET_MS})")
    largest = sorted(parts.items(), key=lambda item: -item[1])[:8]
    print("in workers, without disk, modules included: ms an episode by method:")
    print("  " + ", ".join(f"{name} {1000 * value:.1f}" for name, value in largest))


if __name__ == "__main__":
    main()
