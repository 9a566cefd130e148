"""CPU-seconds of the passes of one GRPO step: one padded row per sample against the shared prefix.

    python benchmarks/training/passes.py [--model tiny|small] [--dtype float32|bfloat16] ...

The work is fixed: 64 prompts of 5 to 46 tokens, 8 samples each, 32 tokens per sample; a model of
Qwen2's shape with 1.05 M (tiny, vocabulary 512) or 25.7 M parameters (small, vocabulary 4096).
Both layouts must give the same gradient norm. CPU-seconds of the process, best of --repeats.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would count as work

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_flows.models.causal_lm_module import cut_rows
from rlhf_flows.models.fused_layers import fuse_layers
from rlhf_flows.models.response_logprobs import Layout, response_logprobs
from rlhf_flows.models.shared_prefix import ATTENTION

SHAPES = {
    "tiny": (512, 128, 512, 4, 4, 2),
    "small": (4096, 512, 1408, 8, 8, 4),
}
PROMPTS, SIBLINGS, TOKENS = 64, 8, 32


def build(name: str, dtype: str, *, fused: bool) -> Any:
    vocabulary, hidden, inner, layers, heads, kv = SHAPES[name]
    torch.manual_seed(1234)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model: Any = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    model.set_attn_implementation(ATTENTION)
    if fused:
        fuse_layers(model)
    return model


class Work:
    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        g = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        lengths = torch.randint(5, 47, (PROMPTS,), generator=g).tolist()
        prompts = [torch.randint(3, vocabulary, (n,), generator=g) for n in lengths]
        size = PROMPTS * SIBLINGS
        self.prompts = [p for p in prompts for _ in range(SIBLINGS)]
        self.responses = list(torch.randint(3, vocabulary, (size, TOKENS), generator=g))
        self.groups = [i // SIBLINGS for i in range(size)]
        self.advantages = torch.randn(size, generator=g)
        self.scale = 1.0 / (size * TOKENS)

    def logprobs(self, rows: list[int], layout: Layout) -> torch.Tensor:
        return response_logprobs(
            self.model,
            [self.prompts[i] for i in rows],
            [self.responses[i] for i in rows],
            [self.groups[i] for i in rows],
            layout=layout,
        ).logprobs

    def bins(self, layout: Layout) -> list[list[int]]:
        if layout == "padded":  # 64 rows each, sorted by length
            order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
            return [order[i : i + 64] for i in range(0, len(order), 64)]
        return cut_rows(self.prompts, self.responses, self.groups, budget=self.tokens)

    def train(self, layout: Layout) -> None:
        for rows in self.bins(layout):
            logprobs = self.logprobs(rows, layout)
            advantages = self.advantages[rows].repeat_interleave(TOKENS)
            ratio = (logprobs - logprobs.detach()).exp()
            (-self.scale * (ratio * advantages).sum()).backward()

    @torch.no_grad()
    def reference(self, layout: Layout) -> None:
        for rows in self.bins(layout):
            self.logprobs(rows, layout)


def cost(run: Callable[[], None], model: Any, repeats: int) -> tuple[float, float]:
    run()
    found = []
    for _ in range(repeats):
        model.zero_grad()
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layouts", nargs="+", default=["padded", "shared_prefix"])
    parser.add_argument("--tokens", type=int, default=4096, help="budget of a micro-batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="operators of one training pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for layout in options.layouts:
        # The padded row is plain transformers, but for the head on response tokens alone.
        model = build(options.model, options.dtype, fused=layout != "padded")
        work = Work(model, options.tokens)
        cpu, wall = cost(partial(work.train, layout), model, options.repeats)
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in model.parameters()])
        ref_cpu, ref_wall = cost(partial(work.reference, layout), model, options.repeats)
        print(
            f"{options.model} {options.dtype} {layout:14s}"
            f" train {cpu:6.2f} CPU-s {wall:6.2f} s   logprobs {ref_cpu:6.2f} CPU-s"
            f" {ref_wall:6.2f} s   gradient norm {float(norm):.5f}",
            flush=True,
        )
    if options.profile:
        with torch.profiler.profile() as found:
            work.train(options.layouts[-1])
        for e in sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)[:24]:
            print(f"{e.key[:60]:60s} {e.self_cpu_time_total / 1e3:9.1f} ms {e.count:6d} calls")


if __name__ == "__main__":
    main()
