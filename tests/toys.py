"""Small real modules for whole-system tests: seconds instead of minutes, the same contracts.

The "model" is a vector of preferences over ten digits; the policy samples a digit with the seed of
its sample, the reward likes digits near 7, the trainer takes REINFORCE steps with Adam.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from rlhf_flows.modules import BaseModule, TorchModule

DIGITS = 10


class Rows(Dataset[dict[str, Any]]):
    collate_fn = None

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": str(self.rows[index]["prompt"])}


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.preferences = nn.Parameter(torch.zeros(DIGITS))


class ToyPolicy(TorchModule):
    """Samples a digit for each prompt; logs each call so that tests can count them.

    Samples whose ids are among `ends` end its process.
    """

    generates = True
    default_threads = 1

    def __init__(
        self,
        name: str,
        *,
        log: Path | None = None,
        slow_s: float = 0.0,
        ends: Collection[str] = (),
    ) -> None:
        super().__init__(name)
        self.log = log
        self.slow_s = slow_s
        self.ends = frozenset(ends)

    def setup(self) -> None:
        self.model = Digits()

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Rows:
        return Rows(prompts)

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        time.sleep(self.slow_s)
        if self.ends.intersection(data["sample_id"]):
            self._log(data["sample_id"])
            os._exit(1)
        logprobs = self.model.preferences.detach().log_softmax(-1)
        chosen = []
        for seed in data["seed"].tolist():
            generator = torch.Generator().manual_seed(seed)
            chosen.append(int(torch.multinomial(logprobs.exp(), 1, generator=generator)))
        self._log(data["sample_id"])
        digits = torch.tensor(chosen)
        return {
            **data,
            "completion": [str(d) for d in chosen],
            "response_ids": [torch.tensor([d]) for d in chosen],
            "behaviour_logprobs": [logprobs[d : d + 1] for d in chosen],
            "digit": digits,
        }

    def _log(self, samples: Sequence[str]) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                for name in samples:
                    file.write(f"{os.getpid()} {name}\n")


class ToyReward(BaseModule):
    """Likes digits near `goal`; hangs on samples whose ids are among `hangs`."""

    default_threads = 1

    def __init__(self, name: str, *, goal: int = 7, hangs: Collection[str] = ()) -> None:
        super().__init__(name)
        self.goal = goal
        self.hangs = frozenset(hangs)

    def setup(self) -> None:
        pass

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        if self.hangs.intersection(data.get("sample_id", ())):
            time.sleep(3600)
        distance = (data["digit"] - self.goal).abs().float()
        return {"reward": 1.0 - distance / DIGITS, "exact": (distance == 0).float()}


class ToyReference(TorchModule):
    """Holds preferences, and says how likely a sampled digit is by them."""

    default_threads = 1

    def setup(self) -> None:
        self.model = Digits()

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        logprobs = self.model.preferences.detach().log_softmax(-1)
        return {"reference_logprobs": [logprobs[d : d + 1] for d in data["digit"].tolist()]}


class ToyTrainer(TorchModule):
    default_threads = 1

    def __init__(self, name: str, *, learning_rate: float = 0.2, slow_s: float = 0.0) -> None:
        super().__init__(name)
        self.learning_rate = learning_rate
        self.slow_s = slow_s

    def setup(self) -> None:
        self.model = Digits()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Rows:
        return Rows(prompts)

    def train_step(self, data: list[dict[str, Any]], iteration: int) -> Mapping[str, float]:
        time.sleep(self.slow_s)
        loss = torch.zeros(())
        for batch in data:
            reward = batch["reward"]
            advantage = reward - reward.mean()
            logprobs = self.model.preferences.log_softmax(-1)[batch["digit"]]
            loss = loss - (logprobs * advantage).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}
