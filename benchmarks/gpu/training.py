"""What a trainer reaches on one device: model FLOPs utilization, the logprob pass, weight export.

The decision here: a model is built once and tried with several cuts of the same batch, with and
without recomputation; what does not fit says so, and the next is tried. Utilization counts what the
model asks for, never what is computed again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.arithmetic import dense_peak, forward_flops, matmul_rate, training_flops
from benchmarks.decoders import SIZES, joined_alone
from benchmarks.learners import Learner, MegatronLearner, TorchLearner, batch_of, mixed_texts

__all__ = ["measure_training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    tokens: int
    """Of one micro-batch, at most."""
    recompute: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    shape: str
    batch_tokens: int
    longest: int
    plans: tuple[Plan, ...]
    """The first that fits is followed by those after it while there is time."""


SIZINGS = {
    "toy": Sizing(
        shape="toy",
        batch_tokens=400,
        longest=64,
        plans=(Plan(tokens=200, recompute=False), Plan(tokens=200, recompute=True)),
    ),
    "1.5B": Sizing(
        shape="1.5B",
        batch_tokens=65536,
        longest=4096,
        plans=(
            Plan(tokens=16384, recompute=False),
            Plan(tokens=32768, recompute=False),
            Plan(tokens=16384, recompute=True),
        ),
    ),
    "7B": Sizing(
        shape="7B",
        batch_tokens=32768,
        longest=4096,
        plans=(
            Plan(tokens=4096, recompute=False),
            Plan(tokens=8192, recompute=True),
            Plan(tokens=4096, recompute=True),
        ),
    ),
}


def measure_training(by: str, size: str, device: str, *, most_s: float) -> Iterator[dict[str, Any]]:
    """One row a plan, then one of logprobs and one of export. `by` is torch or megatron."""
    sizing = SIZINGS[size]
    end = time.perf_counter() + most_s
    shape, dtype = SIZES[sizing.shape], torch.bfloat16
    texts = mixed_texts(sizing.batch_tokens, longest=sizing.longest)
    tokens = sum(p + r for p, r in texts)
    rate = matmul_rate(shape, tokens=sizing.plans[0].tokens, dtype=dtype, device=device)
    peak = dense_peak(torch.cuda.get_device_name()) if device != "cpu" else None
    about = {"by": by, "model": size, "tokens": tokens, "texts": len(texts)}
    yield {**about, "what": "matmul", "tflops": rate / 1e12, "peak_tflops": (peak or rate) / 1e12}
    batch = batch_of(texts, vocabulary_size=shape.vocabulary_size)
    with ExitStack() as stack:
        learner: Learner
        options: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "micro_batch_tokens": sizing.plans[0].tokens,
        }
        started = time.perf_counter()
        if by == "torch":
            learner = TorchLearner(shape, **options)
        else:
            learner = MegatronLearner(shape, stack.enter_context(joined_alone(device)), **options)
        _wait(device)
        yield {**about, "what": "build", "seconds": time.perf_counter() - started}
        flops = training_flops(shape, texts)
        fitting: Plan | None = None
        for plan in sizing.plans:
            if fitting is not None and time.perf_counter() > end - 0.4 * most_s:
                break
            row = _steps(learner, batch, plan, device)
            if "seconds" in row:
                fitting = fitting or plan
                achieved = flops / row["seconds"]
                row["tokens_per_s"] = tokens / row["seconds"]
                row["mfu"] = achieved / (peak or rate)
                row["of_matmuls"] = achieved / rate
            yield {**about, "what": "train", "micro_batch": plan.tokens, **row}
        used = fitting or sizing.plans[-1]
        learner.use(micro_batch_tokens=used.tokens, recompute=used.recompute)
        seconds = _timed(lambda: learner.logprobs(batch), device)
        yield {
            **about,
            "what": "logprobs",
            "tokens_per_s": tokens / seconds,
            "mfu": forward_flops(shape, texts) / seconds / (peak or rate),
        }
        yield {**about, "what": "export", **_export(learner, device)}


def _steps(learner: Learner, batch: Any, plan: Plan, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {"recompute": plan.recompute}
    learner.use(micro_batch_tokens=plan.tokens, recompute=plan.recompute)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    try:
        first = learner.step(batch)
        times = [_timed(lambda: learner.step(batch), device, warm=False) for _ in range(2)]
        row["seconds"] = min(times)
        row["loss"], row["grad_norm"] = first["loss"], first["grad_norm"]
    except torch.OutOfMemoryError as failure:
        row["failed"] = str(failure).splitlines()[0][:200]
    if device != "cpu":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        # Outside of the handler, whose traceback holds what did not fit.
        gc.collect()
        torch.cuda.empty_cache()
    return row


def _export(learner: Learner, device: str) -> dict[str, Any]:
    """All weights under their checkpoint's names, gathered; and also copied to the host."""

    def read(*, to_host: bool) -> tuple[int, float]:
        size = 0
        _wait(device)
        started = time.perf_counter()
        for _, weight in learner.named_weights():
            size += weight.nbytes
            if to_host:
                weight.cpu()
        _wait(device)
        return size, time.perf_counter() - started

    size, seconds = read(to_host=False)
    _, with_copy_s = read(to_host=True)
    return {
        "bytes": size,
        "gb_per_s": size / seconds / 1e9,
        "to_host_gb_per_s": size / with_copy_s / 1e9,
    }


def _timed(work: Any, device: str, *, warm: bool = True) -> float:
    if warm:
        work()
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
