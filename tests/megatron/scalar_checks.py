"""What ranks check of models with a scalar head; each function runs on every rank of a test
(`ranks.py`). The other side of every comparison is the model that torch trains, on padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.megatron.passes import MegatronPasses
from rlhf_flows.models.megatron.rows import all_last_scores, all_logprobs, all_scores
from rlhf_flows.models.scalar_model import (
    HeadInit,
    last_scores,
    load_scalar_model,
    one_longer,
    response_scores,
)
from rlhf_flows.models.sft_trainer import SFTTrainer
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.modules.megatron.topology import Topology
from tests.megatron.checks import loaded
from tests.megatron.training_checks import cut


def samples() -> Batch:
    g = torch.Generator().manual_seed(7)
    lengths = [(3, 9), (1, 2), (20, 1), (7, 16), (2, 5), (11, 3), (4, 25)]
    return {
        "prompt_ids": [torch.randint(200, (p,), generator=g) for p, _ in lengths],
        "response_ids": [torch.randint(200, (r,), generator=g) for _, r in lengths],
    }


def scores_and_weights(
    folder: str, head_init: HeadInit, topologies: Sequence[Topology], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """For each topology: the largest differences of scores, names of weights that come out other
    than they went in, and the order of all.
    """
    plain = load_scalar_model(folder, head_init=head_init).eval()
    stored = plain.state_dict()
    batch = samples()
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    with torch.no_grad():
        expected = {
            "before": response_scores(plain, prompts, responses, layout="padded"),
            "with ends": response_scores(plain, prompts, one_longer(responses), layout="padded"),
            "last": last_scores(plain, prompts, responses, layout="padded"),
        }
    assert head_init == "zero" or expected["before"].std() > 0.1
    found = []
    for topology in topologies:
        with loaded(folder, topology, head_init=head_init) as model:
            weights = dict(model.named_weights())
            passes, parts = MegatronPasses(model), cut(batch, sizes)
            scores = {
                "before": passes.response_scores(parts),
                "with ends": passes.response_scores(parts, ends=True),
                "last": passes.last_scores(parts),
            }
        wrong = [n for n in stored if n not in weights or not torch.equal(stored[n], weights[n])]
        found.append(
            {
                "scores": {
                    name: float((torch.cat(scores[name]) - expected[name]).abs().max())
                    for name in expected
                },
                "wrong": wrong + [n for n in weights if n not in stored],
                "order": list(weights),
            }
        )
    return found


def rows_of_a_batch(folder: str, scalar_folder: str, topology: Topology) -> dict[str, float]:
    """Largest differences of what all rows get from the plain modules' answers, in micro-batches so
    small that some ranks have none; infinity where a rank lacks a row.
    """
    batch = samples()
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    sft = SFTTrainer(path=folder, layout="padded")
    sft.attach(ModuleContext())
    sft.setup()
    plain = load_scalar_model(scalar_folder, head_init="zero").eval()
    with torch.no_grad():
        flat = response_scores(plain, prompts, one_longer(responses), layout="padded")
    ends = list(flat.split([len(r) + 1 for r in responses]))
    expected = {
        "logprobs": sft.all_logprobs(batch, temperature=0.7),
        "scores": [row[:-1] for row in ends],
        "with ends": ends,
        "last": [row[-1] for row in ends],
    }
    found: dict[str, list[torch.Tensor]] = {}
    with loaded(folder, topology) as model:
        found["logprobs"] = all_logprobs(
            MegatronPasses(model), batch, temperature=0.7, micro_batch_tokens=30
        )
    with loaded(scalar_folder, topology, head_init="zero") as model:
        passes = MegatronPasses(model)
        found["scores"] = all_scores(passes, batch, micro_batch_tokens=30)
        found["with ends"] = all_scores(passes, batch, ends=True, micro_batch_tokens=4096)
        found["last"] = all_last_scores(passes, batch, micro_batch_tokens=1)
    for name, rows in found.items():
        assert [r.shape for r in rows] == [r.shape for r in expected[name]], name
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(rows, expected[name], strict=True))
        for name, rows in found.items()
    }
