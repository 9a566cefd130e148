"""Tokens per CPU-second of training steps by torch and by Megatron, beside the arithmetic floor.

python -m benchmarks.train                     25M and 150M parameters in float32 and bfloat16
python -m benchmarks.train --model 25M --dtype float32 --what texts
python -m benchmarks.train --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of C

from benchmarks.arithmetic import training_flops
from benchmarks.decoders import SIZES
from benchmarks.machine import describe_machine, one_line
from benchmarks.marks import read_mark
from benchmarks.options import options_of
from benchmarks.side import bench_folder
from benchmarks.train.work import SIBLINGS, WAYS, What, Work, texts_of

TOKENS = {"toy": 400, "25M": 2048, "150M": 1024}
"""Of a global batch."""
ALONE = [name for name, way in WAYS.items() if way.ranks == 1 and way.threads == 1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--model", default="25M,150M", help=f"of {','.join(TOKENS)}")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--what", default="texts,siblings", help=f"of {','.join(get_args(What))}")
    parser.add_argument("--ways", help=f"by semicolons, of {'; '.join(WAYS)}")
    parser.add_argument("--tokens", type=int, help="of a global batch, about")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is taken")
    parser.add_argument("--steps", type=int, default=1, help="measured in each round, after one")
    parser.add_argument("--quick", action="store_true", help="25M in float32, one round")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    if args.quick:
        args.model, args.dtype, args.rounds = "25M", "float32", 1
    machine = describe_machine()
    print(one_line(machine), flush=True)
    results: list[dict[str, Any]] = []
    for model in args.model.split(","):
        for dtype in args.dtype.split(","):
            for what in args.what.split(","):
                # Ranks share nothing of what siblings are about.
                ways = args.ways or ";".join(WAYS if what == "texts" else ALONE)
                tokens = args.tokens or TOKENS[model]
                work = Work(
                    model=model,
                    what=what,
                    dtype=dtype,
                    ways=ways,
                    tokens=tokens,
                    longest=tokens // 4,
                    micro_batch_tokens=tokens // 2,
                    steps=args.steps,
                    rounds=args.rounds,
                )
                results.append({"work": asdict(work), "rows": _run(work)})
                print(_table(work, results[-1]["rows"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


def _run(work: Work) -> list[dict[str, Any]]:
    """A row for each way and round, with what each of its ranks measured."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",  # threads that spin would count as work
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("OMP_NUM_THREADS", None)
    root = bench_folder()
    root.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for rank in range(max(WAYS[name].ranks for name in work.ways.split(";"))):
            command = [sys.executable, "-m", "benchmarks.train.rank", str(store.port), str(rank)]
            log = stack.enter_context((root / f"train-{rank}.log").open("w"))
            process = subprocess.Popen(
                [*command, *options_of(work)],
                stdout=subprocess.PIPE if rank == 0 else log,
                stderr=log,
                text=True,
                env=environment,
            )
            stack.callback(process.kill)
            processes.append(process)
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            row = read_mark(line)
            if row is not None:
                rows.append(row)
                print(f"  {row['way']}: {_cpu_s(row):.2f} CPU-s a step", flush=True)
        codes = [process.wait(timeout=60) for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with exit codes {codes}: see {root}/train-*.log")
    return rows


def _cpu_s(row: dict[str, Any]) -> float:
    """Of all ranks, of the cheapest step: what else the machine does only adds."""
    return float(min(map(sum, zip(*(rank["cpu_s"] for rank in row["ranks"]), strict=True))))


def _table(work: Work, rows: list[dict[str, Any]]) -> str:
    shape, texts = SIZES[work.model], texts_of(work)
    tokens = sum(p + r for p, r in texts)
    lines = [
        "",
        f"{work.what}, {work.model}, {work.dtype}: {len(texts)} samples, {tokens} tokens a step",
        "",
        "| | tokens per CPU-s | of torch, packed | of the floor | products, GFLOP per CPU-s"
        " | tokens/s | logprobs, tokens per CPU-s | loss | gradient norm |",
        f"|{'---|' * 9}",
    ]
    base: float | None = None
    for name in work.ways.split(";"):
        own = [row for row in rows if row["way"] == name]
        cpu_s = min(_cpu_s(row) for row in own)
        shared = SIBLINGS if work.what == "siblings" and WAYS[name].shares_prompts() else 1
        flops = training_flops(shape, texts, siblings=shared)
        ranks = [rank for row in own for rank in row["ranks"]]
        rate = statistics.fmean(rank["rate"] for rank in ranks)
        wall_s = min(min(rank["wall_s"]) for rank in ranks)
        logprobs_s = min(rank["logprobs_cpu_s"] for rank in ranks)
        logprobs = f"{tokens / logprobs_s:.0f}" if WAYS[name].ranks == 1 else ""
        base = base or tokens / cpu_s
        lines.append(
            f"| {name} | {tokens / cpu_s:.0f} | {tokens / cpu_s / base:.2f}"
            f" | {flops / rate / cpu_s:.2f} | {rate / 1e9:.0f} | {tokens / wall_s:.0f}"
            f" | {logprobs} | {ranks[0]['loss']:.5f} | {ranks[0]['grad_norm']:.5f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
