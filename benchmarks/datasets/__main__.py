"""What a file of rows costs that is larger than memory should be: seconds and peak memory.

    python -m benchmarks.datasets [--quick] [--json FILE]

Writes a file of JSON lines (2 GB; 200 MB with --quick) into a temporary folder, and reads it in a
process of its own: `load_rows` (every line checked, types, ids, digest), then rows in any order,
all rows in order, some tokenized. Beside it: a file with one broken line in a million. Peak memory
is what the process grew by up to then, after it had read a small file in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, one_line

ROOT = Path(__file__).resolve().parents[2]
ROW_BYTES = 1000
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru") for b in ("la", "ma", "no", "ri", "tu")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datasets")
    parser.add_argument("--quick", action="store_true", help="200 MB in place of 2 GB")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    machine = describe_machine()
    print(one_line(machine), flush=True)
    num_bytes = 200_000_000 if args.quick else 2_000_000_000
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-rows-") as folder:
        small, large = Path(folder, "small.jsonl"), Path(folder, "large.jsonl")
        write(small, 40_000_000)
        write(large, num_bytes)
        found += run("steps", small, large)
        large.unlink()
        broken = Path(folder, "broken.jsonl")
        write_broken(broken)
        found += run("broken", broken, broken)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "found": found}, indent=1))


def write(path: Path, num_bytes: int) -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=150)) for _ in range(512)]
    written = number = 0
    with path.open("w", buffering=1 << 20) as file:
        while written < num_bytes:
            row = {
                "id": number,
                "prompt": f"{number} {texts[generator.randrange(512)]}"[: ROW_BYTES // 2],
                "answer": texts[generator.randrange(512)][: ROW_BYTES // 2 - 60],
                "weight": number % 7 + 0.5,
            }
            written += file.write(json.dumps(row) + "\n")
            number += 1


def write_broken(path: Path) -> None:
    with path.open("w", buffering=1 << 20) as file:
        for number in range(1_000_000):
            good = f'{{"prompt": "what is {number}?", "answer": "{number}"}}\n'
            file.write(good if number != 734_900 else good.replace(",", ""))


def run(what: str, small: Path, large: Path) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "benchmarks.datasets.reader", what, str(small), str(large)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = []
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        for line in reader.stdout:
            found.append(json.loads(line))
            show(found[-1])
    if reader.returncode:
        sys.exit(f"the reader ended with {reader.returncode}")
    return found


def show(found: dict[str, Any]) -> None:
    print(
        f"  {found['step']:9} {found['seconds']:7.1f} s, {found['cpu_s']:7.1f} CPU-s, peak"
        f" +{found['grown_mb']:4.0f} MB   {found['said']}   (load {os.getloadavg()[0]:.1f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
