"""All that is to be known of one CUDA GPU, in under eight minutes, on a machine with torch alone.

python -m benchmarks.gpu                         results in outputs/gpu: JSON lines and a table
python -m benchmarks.gpu --only agreement,attention
python -m benchmarks.gpu --cpu-rehearsal         the same code on toy sizes, without a GPU

Needed: torch, numpy, safetensors, psutil, pydantic; transformers for what torch's trainers do, and
megatron-core, a wheel without dependencies, for what Megatron's do. No Ray, Prefect or vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import table_of
from benchmarks.marks import read_mark

SECTIONS: dict[str, float] = {
    "machine": 30,
    "agreement": 80,
    "attention": 90,
    "torch 1.5B": 60,
    "megatron 1.5B": 60,
    "torch 7B": 75,
    "megatron 7B": 75,
}
"""In order, with the most seconds of each."""
REHEARSED = ["machine", "agreement", "attention", "torch toy", "megatron toy"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="toy sizes, without a GPU")
    parser.add_argument("--only", default="", help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--budget-s", type=float, default=470.0, help="of everything")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    args = parser.parse_args()
    device = "cpu" if args.cpu_rehearsal else "cuda"
    names = REHEARSED if args.cpu_rehearsal else [*SECTIONS]
    if args.only:
        names = [name for name in names if name in args.only.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget_s
    rows: list[dict[str, Any]] = []
    for name in names:
        limit = min(SECTIONS.get(name, 60.0), end - time.monotonic())
        rows += _run(name, device, limit, args.out)
        # After each section: whatever ends this program leaves what was measured.
        (args.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (args.out / "results.md").write_text(table_of(rows))
    print((args.out / "results.md").read_text())
    return 1 if any("failed_section" in row or row.get("fine") is False for row in rows) else 0


def _run(name: str, device: str, limit_s: float, out: Path) -> list[dict[str, Any]]:
    """The rows of a section; the last says so where it failed."""
    rows: list[dict[str, Any]] = []
    if limit_s < 5:
        return [{"section": name, "failed_section": "no time was left"}]
    log = out / f"{name.replace(' ', '-')}.log"
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.section", name, device, str(limit_s)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    # Blocks of many sizes: without it a large model's memory falls to pieces.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        alarm = threading.Timer(limit_s, process.kill)
        alarm.start()
        assert process.stdout is not None
        for line in process.stdout:
            row = read_mark(line)
            if row is None:
                errors.write(line)
                continue
            del row["kind"]
            rows.append(row)
            print(json.dumps(row), flush=True)
        code = process.wait()
        alarm.cancel()
    seconds = time.monotonic() - started
    if code != 0:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        why = f"ended after {limit_s:.0f} s" if seconds >= limit_s else (lines or ["no output"])[-1]
        rows.append({"section": name, "failed_section": why[:300], "log": str(log)})
        print(json.dumps(rows[-1]), flush=True)
    print(f"# {name}: {seconds:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
