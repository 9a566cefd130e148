"""The ready-made roles on every kind of model: they learn, and what they export is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_flows.data.batch import Batch, collate
from rlhf_flows.models import (
    DPOTrainer,
    PolicyTrainer,
    Reference,
    RewardTrainer,
    SFTTrainer,
    ValueTrainer,
)
from rlhf_flows.models.causal_lm import load_causal_lm
from rlhf_flows.settings import OptimizerSettings

FAST = OptimizerSettings(learning_rate=1e-2)
ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(0, 40, 3)]
TEXT = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))


def ready(made: Any) -> Any:
    made.validate()
    made.setup()
    return made


def learn(made: SFTTrainer, *, steps: int) -> list[float]:
    dataset = made.build_dataset(ROWS)
    data = made.prepare_batch(collate([dataset[i] for i in range(len(dataset))]))
    return [made.train_step(made.micro_batches(data), i)["loss"] for i in range(steps)]


def samples(size: int = 8) -> Batch:
    g = torch.Generator().manual_seed(0)

    def texts() -> list[Tensor]:
        lengths = torch.randint(1, 8, (size,), generator=g).tolist()
        return [torch.randint(3, 200, (n,), generator=g) for n in lengths]

    responses = texts()
    lengths = [len(r) for r in responses]
    return {
        "sample_id": [f"s{i}" for i in range(size)],
        "group": torch.arange(size // 2).repeat_interleave(2),
        "prompt_ids": [p for p in texts()[: size // 2] for _ in range(2)],
        "response_ids": responses,
        "chosen_ids": texts(),
        "rejected_ids": texts(),
        "reference_chosen_logprob": -20 * torch.rand(size, generator=g),
        "reference_rejected_logprob": -20 * torch.rand(size, generator=g),
        "reward": torch.rand(size, generator=g),
        "finish_reason": ["stop"] * size,
        "behaviour_logprobs": [-4 - torch.rand(n, generator=g) for n in lengths],
        "reference_logprobs": [-4 - torch.rand(n, generator=g) for n in lengths],
        "returns": [torch.rand(n, generator=g) for n in lengths],
        "values": [torch.rand(n, generator=g) for n in lengths],
    }


def test_an_export_is_a_checkpoint_of_transformers_with_the_same_bits(
    variant: Path, tmp_path: Path
) -> None:
    made = ready(SFTTrainer(path=variant, optimizer=FAST))
    losses = learn(made, steps=6)
    assert losses[-1] < 0.8 * losses[0]
    made.save_pretrained(tmp_path)
    # What is sent to samplers is what stands in the file, by name, shape and value.
    stored, sent = load_file(tmp_path / "model.safetensors"), dict(made.named_weights())
    assert stored.keys() == sent.keys() == load_file(variant / "model.safetensors").keys()
    assert all(torch.equal(stored[name], weight) for name, weight in sent.items())
    with torch.no_grad():
        expected = made.model(TEXT).logits
        assert torch.equal(load_causal_lm(tmp_path)(TEXT).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(plain(TEXT).logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_state_of_another_trainer_continue_its_training_bit_for_bit(
    variant: Path, tmp_path: Path, dtype: Any
) -> None:
    first = ready(SFTTrainer(path=variant, optimizer=FAST, dtype=dtype))
    learn(first, steps=2)
    weights, state = tmp_path / "weights", tmp_path / "state"
    weights.mkdir()
    state.mkdir()
    first.save_pretrained(weights)
    first.save_state(state)
    second = ready(SFTTrainer(path=variant, optimizer=FAST, dtype=dtype))
    second.load_weights(load_file(weights / "model.safetensors").items())
    second.load_state(state)
    assert learn(second, steps=2) == learn(first, steps=2)
    for (name, found), (_, expected) in zip(
        second.named_weights(), first.named_weights(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("kind", [PolicyTrainer, DPOTrainer, RewardTrainer, ValueTrainer])
def test_every_trainer_takes_steps_on_it(variant: Path, kind: Any) -> None:
    made = ready(kind(path=variant, optimizer=FAST))
    before = {name: weight.clone() for name, weight in made.named_weights()}
    data = made.prepare_batch(samples())
    for step in range(2):  # the second starts at a head that is not zero any more
        metrics = made.train_step(made.micro_batches(data), step)
    assert metrics["grad_norm"] > 0
    changed = {n for n, w in made.named_weights() if not torch.equal(w, before[n])}
    # Experts that no token chose have no gradient, and what is added to every score of a reward
    # model has none in the difference of two.
    idle = {n for n in before if ".experts." in n}
    idle |= {"transformer.ln_f.bias"} if kind is RewardTrainer else set()
    assert before.keys() - idle <= changed


def test_a_reference_scores_as_the_plain_model(variant: Path) -> None:
    data = samples()
    out = ready(Reference(path=variant)).forward_step(data)["reference_logprobs"]
    plain = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32).eval()
    for prompt, response, found in zip(data["prompt_ids"], data["response_ids"], out, strict=True):
        with torch.no_grad():
            logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
