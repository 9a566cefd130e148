"""A trainer's share of a global batch: what the ranks before and after it have not, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm_module import tokens_of_bins
from rlhf_flows.models.dpo_trainer import DPOTrainer
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.modules.base import BaseModule, ModuleContext

RANKS = 3


def uneven(num_rows: int = 40, groups: int | None = None) -> Batch:
    g = torch.Generator().manual_seed(0)
    lengths = (3 + 60 * torch.rand(num_rows, generator=g) ** 4).int().tolist()
    batch: Batch = {
        "row": list(range(num_rows)),
        "prompt_ids": [torch.arange(5) for _ in lengths],
        "response_ids": [torch.arange(n) for n in lengths],
    }
    if groups:
        batch["group"] = torch.arange(num_rows) // groups
    return batch


def of_rank(
    trainer: SFTTrainer, batch: Batch, rank: int, runtime: Mapping[str, Any]
) -> list[Batch]:
    trainer.attach(ModuleContext(rank=rank, world_size=RANKS, runtime_args=runtime))
    return trainer.micro_batches(trainer.prepare_batch(batch))


@pytest.mark.parametrize(
    "runtime", [{"train_micro_batch_tokens": 80}, {"train_micro_batch_size": 1}], ids=str
)
def test_ranks_share_all_rows_by_tokens_better_than_in_turn(
    tiny: Path, runtime: Mapping[str, Any]
) -> None:
    trainer, batch = SFTTrainer(path=tiny), uneven()
    shares = [of_rank(trainer, batch, rank, runtime) for rank in range(RANKS)]
    assert sorted(i for share in shares for part in share for i in part["row"]) == batch["row"]
    totals = [sum(len(r) + 5 for part in share for r in part["response_ids"]) for share in shares]

    trainer.attach(ModuleContext(runtime_args=runtime))
    parts = [[batch["row"][i] for i in part] for part in trainer.cut(batch, batch["row"])]
    tokens = tokens_of_bins(parts, batch["prompt_ids"], batch["response_ids"], None)
    in_turn = [sum(tokens[rank::RANKS]) for rank in range(RANKS)]
    assert max(totals) - min(totals) < (max(in_turn) - min(in_turn)) / 2
    assert max(totals) < 1.05 * sum(totals) / RANKS


def test_the_share_is_of_the_data_parallel_rank_wherever_that_is_another(tiny: Path) -> None:
    """Of six ranks of which three share a model, two share the batch."""

    class OfThree(PolicyTrainer):
        @property
        def data_parallel_rank(self) -> int:
            return self.rank // 3

        @property
        def data_parallel_size(self) -> int:
            return 2

    batch = {**uneven(groups=4), "reward": torch.arange(40) % 4.0}
    batch["reward"][:8] = 1  # two groups without a gradient
    rows: list[list[int]] = []
    for rank in range(6):
        made = OfThree(path=tiny, micro_batch_tokens=100)
        made.attach(ModuleContext(rank=rank, world_size=6))
        parts = made.micro_batches(made.prepare_batch(batch))
        rows.append([i for part in parts for i in part["row"]])
    assert rows[0] == rows[1] == rows[2]
    assert rows[3] == rows[4] == rows[5]
    assert sorted(rows[0] + rows[3]) == list(range(40))
    assert rows[0][-8:] == list(range(8))  # what has no gradient, once

    class Plain(OfThree):
        micro_batches = BaseModule.micro_batches

    plain = Plain(path=tiny)
    runtime = {"train_micro_batch_size": 10}
    shares = []
    for rank in (0, 4):
        plain.attach(ModuleContext(rank=rank, world_size=6, runtime_args=runtime))
        shares.append([i for part in plain.micro_batches(batch) for i in part["row"]])
    assert shares == [[*range(10), *range(20, 30)], [*range(10, 20), *range(30, 40)]]


def test_prompts_count_once_for_siblings_only_where_passes_share_them(tiny: Path) -> None:
    class Alone(PolicyTrainer):
        shares_prompts = False

    batch = {**uneven(groups=4), "reward": torch.arange(40) % 4.0}
    batch["response_ids"] = [torch.arange(5)] * 40
    # Prompts and responses of 5: two groups with a prompt each make 50 tokens, or five samples.
    for trainer, samples in ((PolicyTrainer, 8), (Alone, 5)):
        made = trainer(path=tiny, micro_batch_tokens=50)
        made.attach(ModuleContext())
        parts = made.micro_batches(made.prepare_batch(batch))
        assert [len(part["row"]) for part in parts] == [samples] * (40 // samples)


def test_pairs_whose_prompt_is_computed_twice_count_it_twice(tiny: Path) -> None:
    class Alone(DPOTrainer):
        shares_prompts = False

    batch = {
        "prompt_ids": [torch.arange(10)] * 6,
        "chosen_ids": [torch.arange(5)] * 6,
        "rejected_ids": [torch.arange(5)] * 6,
    }
    for trainer, pairs in ((DPOTrainer, 3), (Alone, 2)):
        made = trainer(path=tiny, micro_batch_tokens=60)
        made.attach(ModuleContext())
        parts = made.micro_batches({**batch, "pair_weight": torch.ones(6)})
        assert [len(part["prompt_ids"]) for part in parts] == [pairs] * (6 // pairs)
