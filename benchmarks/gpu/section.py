"""One section in a process of its own: `python -m benchmarks.gpu.section NAME DEVICE SECONDS`.

Its rows are marks on standard output. A section that hangs, runs out of memory or breaks the
device's context takes no other with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.marks import mark


def rows_of(name: str, device: str, most_s: float) -> Iterator[dict[str, Any]]:
    rehearsal = device == "cpu"
    kind, _, rest = name.partition(" ")
    if kind == "machine":
        yield machine(device)
    elif kind == "attention":
        from benchmarks.gpu.attention import measure_attention

        yield from measure_attention(device, rehearsal=rehearsal)
    elif kind == "agreement":
        from benchmarks.gpu.agreement import measure_agreement

        yield from measure_agreement(device, rehearsal=rehearsal)
    else:
        from benchmarks.gpu.training import measure_training

        yield from measure_training(kind, rest, device, most_s=most_s)


def machine(device: str) -> dict[str, Any]:
    import torch

    from benchmarks.machine import describe_machine

    found = describe_machine()
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    return found


def main() -> None:
    name, device, most_s = sys.argv[1:]
    for row in rows_of(name, device, float(most_s)):
        mark("row", section=name, **row)


if __name__ == "__main__":
    main()
