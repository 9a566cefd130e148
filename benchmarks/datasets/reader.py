"""What is measured, in a process of its own: says of each step what it took."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf_flows.data import DemonstrationDataset, load_rows
from rlhf_flows.errors import DataError
from rlhf_flows.models.tiny import character_tokenizer

RANDOM_ROWS = 20_000
TOKENIZED_ROWS = 5_000


def steps(path: str) -> Iterator[tuple[str, str]]:
    """Does one after another; yields (what it was, what it found) when it is done."""
    rows, generator = load_rows(path), random.Random(1)
    yield "load", f"{len(rows)} rows, {type(rows).__name__}, digest {rows_start(path)}"
    for _ in range(RANDOM_ROWS):
        rows[generator.randrange(len(rows))]
    yield "random", f"{RANDOM_ROWS} rows"
    yield "ordered", f"{sum(1 for _ in rows)} rows"
    tokenizer = character_tokenizer()
    DemonstrationDataset(rows[:TOKENIZED_ROWS], tokenizer, max_tokens=1 << 20).check()
    yield "tokenize", f"{TOKENIZED_ROWS} rows"


def rows_start(path: str) -> str:
    rows = load_rows(path)  # asked for again: nothing is read
    return str(getattr(rows, "digest", ""))[:8]


def broken(path: str) -> Iterator[tuple[str, str]]:
    try:
        load_rows(path)
    except DataError as e:
        yield "broken", str(e).rpartition("/")[2]


def peak_mb() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1000


def main(what: str, small: str, large: str) -> None:
    if what == "steps":
        for _ in steps(small):
            pass
    work = steps(large) if what == "steps" else broken(large)
    before = peak_mb()
    for _ in itertools.count():
        wall, cpu = time.perf_counter(), time.process_time()
        step, said = next(work, ("", ""))
        if not step:
            break
        found = {
            "step": step,
            "said": said,
            "seconds": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "grown_mb": peak_mb() - before,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
