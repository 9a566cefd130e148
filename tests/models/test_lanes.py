"""Micro-batches side by side: the same result, in a fixed order, whoever is faster."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_flows.models.causal_lm_module import cut_rows
from rlhf_flows.models.lanes import Lanes
from rlhf_flows.models.policy_trainer import PolicyTrainer
from rlhf_flows.models.reference import Reference
from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.settings import GRPOSettings, OptimizerSettings


def lanes(model: nn.Module | None = None, num_threads: int = 3) -> Lanes:
    return Lanes(model or nn.Linear(2, 2), num_threads=num_threads, device="cpu")


def test_items_are_dealt_out_in_turn_whoever_is_faster() -> None:
    def work(part: Any) -> list[int]:
        time.sleep(0.05 / part[0])
        return list(part)

    assert lanes().run(work, [1, 2, 3, 4, 5]) == [[1, 4], [2, 5], [3]]
    assert lanes().run(work, [1]) == [[1]]


def test_lanes_work_at_the_same_time_and_keep_the_mode_of_autograd() -> None:
    meeting = threading.Barrier(3)

    def work(_: Any) -> tuple[bool, int]:
        meeting.wait(10)
        return torch.is_grad_enabled(), torch.get_num_threads()

    before = torch.get_num_threads()
    with torch.no_grad():
        assert lanes().run(work, [1, 2, 3]) == [(False, 1)] * 3
    assert lanes().run(work, [1, 2, 3]) == [(True, 1)] * 3
    assert torch.get_num_threads() == before


def test_a_failure_is_raised_once_all_lanes_are_done() -> None:
    done: list[int] = []

    def work(part: Any) -> None:
        if part[0] == 2:
            raise ValueError("the second")
        time.sleep(0.05)
        done.append(part[0])

    with pytest.raises(ValueError, match="the second"):
        lanes().run(work, [1, 2, 3])
    assert sorted(done) == [1, 3]


class Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = type("Config", (), config)()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)),
        Model(attention_dropout=0.1),
        Model(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        Model(rope_parameters={"full_attention": {"rope_type": "longrope"}}),
    ],
)
def test_models_that_draw_or_write_while_they_compute_have_one_lane(model: nn.Module) -> None:
    assert (lanes(model).count, lanes(model).threads_each) == (1, 3)


def test_large_models_get_fewer_lanes_and_more_threads_in_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(rope_parameters={"rope_type": "default"}, attention_dropout=0.0)
    monkeypatch.setattr("rlhf_flows.models.lanes._MOST_COPIES_BYTES", 2 * 20 * 4)
    found = lanes(model, num_threads=8)
    assert (found.count, found.threads_each) == (2, 4)
    assert Lanes(model, num_threads=8, device="cuda").count == 1


@pytest.mark.parametrize("budget", [40, 100, 10_000])
@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_micro_batches_come_in_multiples_within_their_budget(budget: int, multiple: int) -> None:
    g = torch.Generator().manual_seed(0)
    prompts = [torch.zeros(int(n)) for n in torch.randint(1, 30, (60,), generator=g)]
    responses = [torch.zeros(int(n)) for n in torch.randint(1, 10, (60,), generator=g)]
    bins = cut_rows(prompts, responses, None, budget=budget, multiple=multiple)
    assert sorted(i for rows in bins for i in rows) == list(range(60))
    assert all(sum(len(prompts[i]) + len(responses[i]) for i in rows) <= budget for rows in bins)
    least = cut_rows(prompts, responses, None, budget=budget)
    assert len(least) <= len(bins) < len(least) + multiple


def context(num_threads: int) -> ModuleContext:
    return ModuleContext(seed=0, num_threads=num_threads, model_args={}, runtime_args={})


def batch(groups: int = 12) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 200, (n,), generator=g) for n in range(4, 4 + groups)]
    responses = [torch.randint(3, 200, (5,), generator=g) for _ in range(4 * groups)]
    return {
        "prompt_ids": [p for p in prompts for _ in range(4)],
        "response_ids": responses,
        "group": torch.arange(groups).repeat_interleave(4),
        "reward": torch.rand(4 * groups, generator=g),
        "reference_logprobs": [-torch.rand(5, generator=g) for _ in responses],
    }


def trained(path: Path, num_threads: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    made = PolicyTrainer(
        "trainer",
        path=path,
        micro_batch_tokens=100,
        optimizer=OptimizerSettings(learning_rate=1e-3),
        grpo=GRPOSettings(kl_coef=0.1),
    )
    made.attach(context(num_threads))
    made.setup()
    assert made.lanes.count == num_threads
    metrics: dict[str, float] = {}
    for step in range(2):
        data = made.micro_batches(made.prepare_batch(batch()))
        metrics = dict(made.train_step(data, step))
    return metrics, {name: w.clone() for name, w in made.named_weights()}


def test_training_in_lanes_is_training_and_the_same_bits_every_time(tiny: Path) -> None:
    metrics, weights = trained(tiny, 2)
    again, same = trained(tiny, 2)
    assert metrics == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    one, alone = trained(tiny, 1)
    assert metrics == pytest.approx(one, rel=1e-4, abs=1e-7)
    for name, weight in alone.items():
        # AdamW's first steps are nearly signs of gradients: where one is nearly 0, they differ.
        assert float((weights[name] - weight).abs().mean()) < 1e-5


def test_logprobs_in_lanes_are_those_of_one(tiny: Path) -> None:
    found = []
    for num_threads in (1, 3):
        made = Reference("reference", path=tiny, micro_batch_tokens=100)
        made.attach(context(num_threads))
        made.setup()
        found.append(made.forward_step(batch())["reference_logprobs"])
    for alone, side_by_side in zip(*found, strict=True):
        torch.testing.assert_close(alone, side_by_side, atol=1e-5, rtol=1e-5)
