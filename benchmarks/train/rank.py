"""One rank of every way, one after another: `python -m benchmarks.train.rank PORT RANK --field=…`.

A way that has fewer ranks leaves the others waiting for it, asleep. All start from the same
weights, so that losses and gradient norms say whether they did the same work. CPU-seconds are those
of the process with all its threads; rates of matrix products are taken by the same clock, on all
ranks of the way at once, just before it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # of C

from benchmarks.arithmetic import matmul_rate
from benchmarks.decoders import SIZES
from benchmarks.learners import Learner, MegatronLearner, TorchLearner, batch_of
from benchmarks.marks import mark
from benchmarks.options import from_command_line
from benchmarks.train.work import SIBLINGS, WAYS, Way, Work, texts_of
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron.topology import model_parallel_groups
from rlhf_flows.modules.rank_group import join_ranks

TIMEOUT_S = 600.0


def main() -> None:
    port, rank = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    work = from_command_line(Work)
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    with tempfile.TemporaryDirectory(prefix="rlhf-flows-bench-") as folder:
        if rank == 0:
            _save_model(work, Path(folder))
            store.set("folder", folder)
        weights = Path(store.get("folder").decode())
        for number in range(work.rounds):
            for name in work.ways.split(";"):
                _take_part(name, number, rank, store, weights, work)


def _save_model(work: Work, folder: Path) -> None:
    torch.manual_seed(0)
    learner = TorchLearner(SIZES[work.model], dtype=torch.float32, micro_batch_tokens=1)
    save_file({n: w.contiguous() for n, w in learner.named_weights()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))


def _take_part(name: str, number: int, rank: int, store: Any, weights: Path, work: Work) -> None:
    way, done = WAYS[name], f"done/{number}/{name}"
    if rank >= way.ranks:
        store.wait([done], timedelta(seconds=4 * TIMEOUT_S))
        return
    join_ranks(
        PrefixStore(f"{number}/{name}", store),
        rank=rank,
        world_size=way.ranks,
        timeout_s=TIMEOUT_S,
    )
    found: list[Any] = [None] * way.ranks
    torch.distributed.all_gather_object(found, _measured(way, rank, weights, work))
    torch.distributed.destroy_process_group()
    if rank == 0:
        mark("row", way=name, round=number, ranks=found)
        store.set(done, "1")


def _measured(way: Way, rank: int, weights: Path, work: Work) -> dict[str, Any]:
    shape = SIZES[work.model]
    batch = batch_of(
        texts_of(work),
        vocabulary_size=shape.vocabulary_size,
        siblings=SIBLINGS if work.what == "siblings" else 1,
    )
    torch.set_num_threads(way.threads)
    rate = matmul_rate(
        shape,
        tokens=work.micro_batch_tokens,
        dtype=work.torch_dtype(),
        device="cpu",
        seconds=1.0,
    )
    with ExitStack() as stack:
        learner = _learner(way, rank, weights, work, stack)
        first = learner.step(batch)
        cpu_s, wall_s = [], []
        for _ in range(work.steps):
            torch.distributed.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            learner.step(batch)
            cpu_s.append(time.process_time() - cpu)
            wall_s.append(time.perf_counter() - wall)
        torch.distributed.barrier()
        cpu = time.process_time()
        if way.ranks == 1:
            learner.logprobs(batch)
        logprobs_cpu_s = time.process_time() - cpu
    return {
        "rate": rate,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "logprobs_cpu_s": logprobs_cpu_s,
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
    }


def _learner(way: Way, rank: int, weights: Path, work: Work, stack: ExitStack) -> Learner:
    shape = SIZES[work.model]
    options: dict[str, Any] = {
        "algorithm": "grpo" if work.what == "siblings" else "sft",
        "dtype": work.torch_dtype(),
        "micro_batch_tokens": work.micro_batch_tokens,
    }
    if way.topology is not None:
        stack.enter_context(model_parallel_groups(way.topology, timeout_s=TIMEOUT_S))
        return MegatronLearner(shape, way.topology, weights=HFFolder(weights), **options)
    return TorchLearner(
        shape,
        layout=way.layout,
        num_threads=way.threads,
        rank=rank,
        world_size=way.ranks,
        weights=HFFolder(weights),
        **options,
    )


if __name__ == "__main__":
    main()
