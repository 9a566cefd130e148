"""What is trained, and by whom: the works and ways of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.arithmetic import Text
from benchmarks.learners import mixed_texts
from rlhf_flows.modules.megatron.topology import Topology

__all__ = ["WAYS", "Way", "What", "Work", "texts_of"]

What = Literal["texts", "siblings"]
SIBLINGS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Who trains, and how its tokens are laid out. Each rank has one thread unless it says so."""

    topology: Topology | None = None
    """Of Megatron; None is torch."""
    ranks: int = 1
    threads: int = 1
    layout: Literal["auto", "padded"] = "auto"

    def shares_prompts(self) -> bool:
        return self.topology is None and self.layout == "auto"


WAYS: dict[str, Way] = {
    "torch, packed": Way(),
    "Megatron, packed": Way(topology=Topology()),
    "torch, padded": Way(layout="padded"),
    "torch, packed, two threads": Way(threads=2),
    "torch, DP2": Way(ranks=2),
    "Megatron, DP2": Way(topology=Topology(world_size=2), ranks=2),
    "Megatron, TP2": Way(topology=Topology(world_size=2, tensor_parallel=2), ranks=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one pair of processes; each field is an option of their command line."""

    model: str
    what: What
    dtype: str
    ways: str
    """Names of `WAYS`, by semicolons."""
    tokens: int
    """Of one global batch, about."""
    longest: int
    """Tokens of the longest text."""
    micro_batch_tokens: int
    steps: int = 1
    """Measured, after one that is not."""
    rounds: int = 2
    """How often all ways are gone through, one after another."""

    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def texts_of(work: Work) -> list[Text]:
    """Texts of very different lengths; or groups of eight responses to a prompt, each of these
    about as long as the prompt.
    """
    if work.what == "texts":
        return mixed_texts(work.tokens, longest=work.longest)
    prompts = mixed_texts(work.tokens // SIBLINGS, longest=work.longest, seed=1)
    responses = iter(mixed_texts(work.tokens * 2, longest=work.longest, seed=2))
    texts: list[Text] = []
    for whole in prompts:
        length = sum(whole) // 2
        texts += [(length, max(1, sum(next(responses)) // 2)) for _ in range(SIBLINGS)]
    return texts
