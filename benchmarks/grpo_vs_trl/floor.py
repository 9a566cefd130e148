"""The floor: the arithmetic of one step, and how fast this machine multiplies matrices.

Counted are multiplications and additions of unpadded sequences: projections, MLPs, attention, and
the head where a token is predicted; backward passes as two forward ones. Counted twice: with each
prompt computed once for its siblings, and once for each of them. Nothing else that a step does is
counted, so no program reaches it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["count_flops", "matmul_rate"]


def count_flops(
    config: Mapping[str, Any],
    prompt_lengths: Sequence[int],
    *,
    samples: int,
    new_tokens: int,
    shared: bool,
) -> dict[str, float]:
    """FLOPs of one step by phase; `shared`: each prompt is computed once for its siblings."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = width // heads
    kv = config["num_key_value_heads"] * head
    layers = config["num_hidden_layers"]
    body = layers * 2 * (2 * width * width + 2 * width * kv + 3 * width * inner)
    vocabulary = 2 * width * config["vocab_size"]

    def attention(start: int, stop: int) -> float:
        seen = sum(range(start + 1, stop + 1))
        return float(layers * 4 * heads * head * seen)

    times = 1 if shared else samples
    generation = forward = 0.0
    for length in prompt_lengths:
        prompt = length * body + attention(0, length)
        # The last token is drawn, never computed with.
        response = (new_tokens - 1) * body + attention(length, length + new_tokens - 1)
        heads_of_prompt = vocabulary * times
        generation += times * prompt + heads_of_prompt
        generation += samples * (response + (new_tokens - 1) * vocabulary)
        forward += times * prompt + heads_of_prompt
        forward += samples * (response + (new_tokens - 1) * vocabulary)
    return {"rollout": generation, "scoring": forward, "training": 3 * forward}


def matmul_rate(dtype: str, *, threads: int, seconds: float = 1.5) -> dict[str, float]:
    """The best GFLOP/s of a large square product now, and per CPU-second of all its threads."""
    torch.set_num_threads(threads)
    size = 2048
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    flops = 2.0 * size**3
    torch.mm(a, b)
    best_s = best_cpu_s = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started, cpu = time.perf_counter(), time.process_time()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started)
        best_cpu_s = min(best_cpu_s, time.process_time() - cpu)
    return {"gflops": flops / best_s / 1e9, "gflop_per_cpu_s": flops / best_cpu_s / 1e9}


if __name__ == "__main__":
    # In a process of its own, because it sets the threads of the process.
    print(json.dumps(matmul_rate(sys.argv[1], threads=int(sys.argv[2]))))
