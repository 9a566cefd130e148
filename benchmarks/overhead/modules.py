"""Modules that do little, on batches of real size: what is left is what the system costs.

512 completions of 32 tokens an episode, and a trainer with a million parameters and AdamW: the
shards, checkpoints and weights of the quickstart's size, without its matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from rlhf_flows.modules import BaseModule, TorchModule

__all__ = ["BenchPolicy", "BenchReward", "BenchTrainer"]

VOCABULARY, WIDTH, NEW_TOKENS = 8192, 128, 32


class Rows(Dataset[dict[str, Any]]):
    collate_fn = None

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt = str(self.rows[index]["prompt"])
        return {"prompt": prompt, "prompt_ids": torch.tensor(list(prompt.encode()))}


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.score = nn.Linear(WIDTH, 1)


class BenchPolicy(TorchModule):
    """Draws tokens at random: no model is computed."""

    generates = True
    default_threads = 1

    def setup(self) -> None:
        self.model = Bag()

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Rows:
        return Rows(prompts)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        return self._complete(data)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return self._complete(data)

    def _complete(self, data: dict[str, Any]) -> dict[str, Any]:
        size = len(data["seed"])
        generator = torch.Generator().manual_seed(int(data["seed"][0]))
        ids = torch.randint(0, VOCABULARY, (size, NEW_TOKENS), generator=generator)
        logprobs = -torch.rand(size, NEW_TOKENS, generator=generator)
        return {
            **data,
            "response_ids": list(ids),
            "behaviour_logprobs": list(logprobs),
            "completion": [" ".join(map(str, row)) for row in ids[:, :8].tolist()],
            "finish_reason": ["length"] * size,
        }


class BenchReward(BaseModule):
    default_threads = 1

    def setup(self) -> None:
        pass

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        return {"reward": torch.tensor([float(len(c) % 7) for c in data["completion"]])}

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        return self.forward_step(data)


class BenchTrainer(TorchModule):
    default_threads = 1

    def setup(self) -> None:
        self.model = Bag()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in data:
            ids = torch.stack(batch["response_ids"])
            scores = self.model.score(self.model.embedding(ids).mean(1))[:, 0]
            loss = (scores * (batch["reward"] - batch["reward"].mean())).mean()
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return {"loss": total}
