"""GRPO by TRL and by us, interleaved: CPU-seconds of the whole process tree and wall time a step.

python -m benchmarks.grpo_vs_trl                     tiny in float32, small in bfloat16
python -m benchmarks.grpo_vs_trl --model tiny --quick
python -m benchmarks.grpo_vs_trl --learn             reward curves of both on the same task
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.grpo_vs_trl.assets import build_prompts
from benchmarks.grpo_vs_trl.floor import count_flops
from benchmarks.grpo_vs_trl.work import Dtype, Work
from benchmarks.machine import describe_machine, one_line
from benchmarks.models import MODELS, build_model
from benchmarks.options import options_of
from benchmarks.side import Measured, bench_folder, measure, trl_python

DTYPES: dict[str, Dtype] = {"tiny": "float32", "small": "bfloat16"}
STEPS = {"tiny": 6, "small": 3}
LEARNING_STEPS, LEARNING_RATE = 40, 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_vs_trl")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of both sides")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--steps", type=int, help="measured steps of one run")
    parser.add_argument("--quick", action="store_true", help="one round, few steps")
    parser.add_argument("--learn", action="store_true", help="compare reward curves on tiny")
    parser.add_argument("--ours-only", action="store_true", help="leave TRL out")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    trl = None if args.ours_only else trl_python()
    root = bench_folder()
    machine = describe_machine()
    print(one_line(machine))
    results: dict[str, Any] = {"machine": machine}
    if args.learn:
        results["learning"] = _learn(
            root, trl, steps=args.steps or LEARNING_STEPS, seeds=args.rounds
        )
    else:
        for name in MODELS if args.model == "both" else [args.model]:
            work = Work(
                model=str(build_model(name, root)),
                prompts=str(build_prompts(root)),
                dtype=args.dtype or DTYPES[name],
                steps=args.steps or (2 if args.quick else STEPS[name]),
            )
            rounds = 1 if args.quick else args.rounds
            results[name] = _compare(name, work, root, trl, rounds=rounds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _compare(name: str, work: Work, root: Path, trl: str | None, *, rounds: int) -> dict[str, Any]:
    print(
        f"\n{name}, {work.dtype} on both sides, {work.steps} steps after {work.warmup}", flush=True
    )
    runs: dict[str, list[Measured]] = {}
    rates = [_rate(work)]
    for _ in range(rounds):
        runs.setdefault("ours", []).append(_run("ours", work, root, sys.executable))
        if trl is not None:
            runs.setdefault("trl", []).append(_run("trl_side", work, root, trl))
        rates.append(_rate(work))
    for label, other in (
        ("ours, full checkpoint every 10", replace(work, save_interval=10)),
        ("ours, two samplers", replace(work, samplers=2)),
    ):
        runs[label] = [_run("ours", other, root, sys.executable)]
    floor = _floor(work, rates)
    _print_table(work, runs, floor)
    return {
        "work": asdict(work),
        "runs": {side: [asdict(m) for m in measured] for side, measured in runs.items()},
        "matmul": rates,
        "floor": floor,
    }


def _run(side: Literal["ours", "trl_side"], work: Work, root: Path, python: str) -> Measured:
    found = measure(
        f"benchmarks.grpo_vs_trl.{side}",
        options_of(work),
        warmup=work.warmup,
        steps=work.steps,
        main_process="the flow" if side == "ours" else "the trainer",
        python=python,
        log=root / f"{side}.log",
    )
    how = "TRL"
    if side == "ours":
        how = f"ours, full checkpoint every {work.save_interval}, {work.samplers} sampler(s)"
    print(
        f"  {how:44} {found.mean_cpu_s:7.2f} CPU-s a step, {found.mean_wall_s:7.2f} s,"
        f" load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return found


def _rate(work: Work) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.grpo_vs_trl.floor", work.dtype, str(work.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rate: dict[str, float] = json.loads(done.stdout)
    return rate


def _floor(work: Work, rates: Sequence[dict[str, float]]) -> dict[str, Any]:
    """CPU-seconds of the counted arithmetic at the best matmul rate that was seen."""
    from rlhf_flows.models.causal_lm import load_tokenizer

    tokenizer = load_tokenizer(work.model)
    lines = Path(work.prompts).read_text(encoding="utf-8").splitlines()
    first = work.prompts_per_step * work.warmup
    rows = lines[first : first + work.prompts_per_step]
    lengths = [len(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in rows]
    config = json.loads(Path(work.model, "config.json").read_text(encoding="utf-8"))
    rate = max(r["gflop_per_cpu_s"] for r in rates)
    floor: dict[str, Any] = {"gflop_per_cpu_s": rate, "gflops": max(r["gflops"] for r in rates)}
    for label, shared in (("prompts once", True), ("prompts for each sample", False)):
        counted = count_flops(
            config, lengths, samples=work.samples, new_tokens=work.new_tokens, shared=shared
        )
        gflop = {phase: flops / 1e9 for phase, flops in counted.items()}
        floor[label] = {"gflop": gflop, "cpu_s": sum(gflop.values()) / rate}
    return floor


def _print_table(work: Work, runs: dict[str, list[Measured]], floor: dict[str, Any]) -> None:
    base = statistics.fmean(m.mean_cpu_s for m in runs["trl"]) if "trl" in runs else None
    print("\n| | CPU-s a step | of TRL | wall s a step | samples/s | samples/CPU-s |")
    print("|---|---|---|---|---|---|")
    for side, measured in runs.items():
        cpu = [c for m in measured for c in m.cpu_s]
        wall = statistics.fmean(w for m in measured for w in m.wall_s)
        mean, samples = statistics.fmean(cpu), work.samples_per_step
        print(
            f"| {side} | {mean:.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
            f" | {'' if base is None else f'{mean / base:.2f}'}"
            f" | {wall:.2f} | {samples / wall:.0f} | {samples / mean:.0f} |"
        )
    for label in ("prompts once", "prompts for each sample"):
        gflop, cpu_s = sum(floor[label]["gflop"].values()), floor[label]["cpu_s"]
        print(f"| floor, {label} ({gflop:.0f} GFLOP) | {cpu_s:.2f} | | | | |")
    print(f"\nfloor at {floor['gflop_per_cpu_s']:.0f} GFLOP per CPU-s, the best product seen")
    for side, measured in runs.items():
        phases = {p: statistics.fmean(m.phases[p] for m in measured) for p in measured[0].phases}
        print(f"\n{side}: wall s by phase:", _listed(phases))
        parts = {
            p: statistics.fmean(m.processes.get(p, 0.0) for m in measured)
            for p in measured[0].processes
        }
        print(f"{side}: CPU-s by process:", _listed(parts))
        first = measured[0]
        print(
            f"{side}: accounts of the first run: {first.accounts}; start and warm-up"
            f" {first.startup_s:.0f} s, {first.startup_cpu_s:.0f} CPU-s",
            flush=True,
        )


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _learn(root: Path, trl: str | None, *, steps: int, seeds: int) -> dict[str, Any]:
    """The reward of each step, by both sides, from the same weights on the same prompts."""
    work = Work(
        model=str(build_model("tiny", root)),
        prompts=str(build_prompts(root)),
        steps=steps - 1,
        learning_rate=LEARNING_RATE,
        save_interval=10,
    )
    found: dict[str, Any] = {"work": asdict(work), "runs": []}
    for seed in range(7, 7 + seeds):
        seeded = replace(work, seed=seed)
        sides = {"ours": _run("ours", seeded, root, sys.executable)}
        if trl is not None:
            sides["trl_side"] = _run("trl_side", seeded, root, trl)
        for side, measured in sides.items():
            curve = measured.curves["reward"]
            every = [f"{value:.3f}" for value in curve[:: max(1, steps // 10)]]
            print(f"  {side} seed {seed}: reward {' '.join(every)} … {curve[-1]:.3f}")
            found["runs"].append({"side": side, "seed": seed, "curves": measured.curves})
    _print_curves(found["runs"], steps)
    return found


def _print_curves(runs: Sequence[dict[str, Any]], steps: int) -> None:
    """Mean reward over seeds, and the standard error of it, at ten places of the curve."""
    print("\n| reward at step | " + " | ".join(sides := sorted({r["side"] for r in runs})) + " |")
    print("|---|" + "---|" * len(sides))
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        cells = []
        for side in sides:
            values = [r["curves"]["reward"][step] for r in runs if r["side"] == side]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} ± {error:.4f}")
        print(f"| {step} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
