"""SFT, reward models and DPO by TRL and by us, interleaved: rows per CPU-second of whole trees.

python -m benchmarks.offline_vs_trl                    all three on tiny, in float32
python -m benchmarks.offline_vs_trl --model small --what dpo
python -m benchmarks.offline_vs_trl --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.machine import describe_machine, one_line
from benchmarks.models import MODELS, build_model, build_reward_model
from benchmarks.offline_vs_trl.assets import build_rows
from benchmarks.offline_vs_trl.work import Lengths, What, Work
from benchmarks.options import options_of
from benchmarks.side import Measured, bench_folder, measure, trl_python

Side = Literal["ours", "trl_side"]
BATCH: dict[str, dict[str, int]] = {
    "tiny": {"sft": 64, "reward": 32, "dpo": 32},
    "small": {"sft": 32, "reward": 16, "dpo": 16},
}
"""Rows of one optimizer step."""
STEPS = {"tiny": 16, "small": 8}
"""Optimizer steps of one episode."""
EPISODES = {"tiny": 3, "small": 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline_vs_trl")
    parser.add_argument("--model", choices=[*MODELS], default="tiny")
    parser.add_argument("--what", default=",".join(get_args(What)), help="of sft,reward,dpo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", choices=get_args(Lengths), default="even", help="of rows")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--steps", type=int, help="optimizer steps of one episode")
    parser.add_argument("--episodes", type=int, help="measured episodes of one run")
    parser.add_argument("--save-interval", type=int, default=1, help="of full checkpoints (ours)")
    parser.add_argument("--quick", action="store_true", help="one round, one episode of 4 steps")
    parser.add_argument("--ours-only", action="store_true", help="leave TRL out")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    asked: list[What] = [what for what in get_args(What) if what in args.what.split(",")]
    if unknown := set(args.what.split(",")) - set(asked):
        parser.error(f"--what has {', '.join(sorted(unknown))}: it takes {get_args(What)}")
    trl = None if args.ours_only else trl_python()
    root = bench_folder()
    machine = describe_machine()
    print(one_line(machine))
    results: dict[str, Any] = {"machine": machine}
    for what in asked:
        build = build_reward_model if what == "reward" else build_model
        work = Work(
            what=what,
            model=str(build(args.model, root)),
            rows=str(build_rows(what, args.lengths, root)),
            dtype=args.dtype,
            batch=BATCH[args.model][what],
            steps=args.steps or (4 if args.quick else STEPS[args.model]),
            episodes=args.episodes or (1 if args.quick else EPISODES[args.model]),
            save_interval=args.save_interval,
        )
        rounds = 1 if args.quick else args.rounds
        results[what] = _compare(args.model, work, root, trl, rounds=rounds)
    _print_table(results, asked)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _compare(name: str, work: Work, root: Path, trl: str | None, *, rounds: int) -> dict[str, Any]:
    print(
        f"\n{work.what}, {name}, {work.dtype} on both sides: {work.episodes} episodes of"
        f" {work.steps} steps of {work.batch} rows, after {work.warmup}",
        flush=True,
    )
    agreement = None if trl is None else _agree(work, root, trl)
    runs: dict[str, list[Measured]] = {}
    for _ in range(rounds):
        runs.setdefault("ours", []).append(_run("ours", work, root, sys.executable))
        if trl is not None:
            runs.setdefault("trl", []).append(_run("trl_side", work, root, trl))
    for side, measured in runs.items():
        parts = {
            p: statistics.fmean(m.processes.get(p, 0.0) for m in measured)
            for p in measured[0].processes
        }
        listed = ", ".join(f"{p} {seconds:.2f}" for p, seconds in parts.items())
        print(f"  {side}: CPU-s of an episode by process: {listed}")
        print(f"  {side}: wall s of an episode by phase: {measured[0].phases}", flush=True)
    return {
        "work": asdict(work),
        "agreement": agreement,
        "runs": {side: [asdict(m) for m in measured] for side, measured in runs.items()},
    }


def _agree(work: Work, root: Path, trl: str) -> dict[str, Any]:
    """What both sides measure in their first two optimizer steps, from the same weights."""
    short = replace(work, steps=1, warmup=1, episodes=1)
    curves = {
        "ours": _measure("ours", short, root, sys.executable).curves,
        "trl": _measure("trl_side", short, root, trl).curves,
    }
    for name in ("loss", "grad_norm", "rows", "tokens"):
        pairs = [
            f"{ours:.6g} and {theirs:.6g}"
            for ours, theirs in zip(
                curves["ours"].get(name, []), curves["trl"].get(name, []), strict=False
            )
        ]
        print(f"  {name} of steps 1 and 2, ours and TRL's: {'; '.join(pairs) or 'not told'}")
    sys.stdout.flush()
    return curves


def _run(side: Side, work: Work, root: Path, python: str) -> Measured:
    found = _measure(side, work, root, python)
    rows = work.rows_per_episode
    print(
        f"  {side:9} {rows / found.mean_cpu_s:7.2f} rows per CPU-s, {found.mean_cpu_s:.2f} CPU-s"
        f" and {found.mean_wall_s:.2f} s an episode, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return found


def _measure(side: Side, work: Work, root: Path, python: str) -> Measured:
    return measure(
        f"benchmarks.offline_vs_trl.{side}",
        options_of(work),
        warmup=work.warmup,
        steps=work.episodes,
        main_process="the flow" if side == "ours" else "the trainer",
        python=python,
        log=root / f"offline-{side}.log",
    )


def _print_table(results: dict[str, Any], asked: Sequence[What]) -> None:
    print("\n| | rows per CPU-s (of the slowest and fastest episode) | of TRL | rows/s | of TRL |")
    print("|---|---|---|---|---|")
    for what in asked:
        runs, work = results[what]["runs"], Work(**results[what]["work"])
        base: tuple[float, float] | None = None
        for side in sorted(runs, reverse=True):  # TRL first
            cpu = [c for m in runs[side] for c in m["cpu_s"]]
            wall = statistics.fmean(w for m in runs[side] for w in m["wall_s"])
            rows = work.rows_per_episode
            mean, rate = rows / statistics.fmean(cpu), rows / wall
            base = base or (mean, rate)
            print(
                f"| {what}: {side} | {mean:.1f} ({rows / max(cpu):.1f} to {rows / min(cpu):.1f})"
                f" | {mean / base[0]:.2f} | {rate:.1f} | {rate / base[1]:.2f} |"
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
