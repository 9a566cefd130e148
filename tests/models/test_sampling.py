from __future__ import annotations

import pytest
import torch

from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models.sampling import draw, processed_logprobs, row_uniforms

LOGITS = torch.randn(50, 23, generator=torch.Generator().manual_seed(0)) * 2


def kept_by_hand(probabilities: list[float], *, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn, token by token, as the settings' descriptions say."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    order = [i for i in order if probabilities[i] >= min_p * probabilities[order[0]]]
    order = order[: top_k or None]
    whole, sum_, kept = sum(probabilities[i] for i in order), 0.0, set()
    for i in order:
        kept.add(i)
        sum_ += probabilities[i] / whole
        if sum_ >= top_p:
            break
    return kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 4, "top_p": 0.9},
        {"top_k": 12, "top_p": 0.6, "min_p": 0.02, "temperature": 1.4},
    ],
)
def test_truncation_keeps_the_tokens_that_its_settings_say(options: dict[str, float]) -> None:
    settings = GenerationSettings.model_validate({"temperature": 0.8, **options})
    found = processed_logprobs(LOGITS, settings)
    tempered = (LOGITS / settings.temperature).softmax(-1)
    for row, probabilities in zip(found, tempered.tolist(), strict=True):
        kept = kept_by_hand(
            probabilities, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
        )
        assert {i for i, p in enumerate(row.tolist()) if p > -torch.inf} == kept
        whole = sum(probabilities[i] for i in kept)
        for i in kept:
            assert row[i].exp().item() == pytest.approx(probabilities[i] / whole, rel=1e-4)


def test_greedy_logprobs_are_those_of_the_model() -> None:
    settings = GenerationSettings(temperature=0.0, top_k=1)
    assert torch.equal(processed_logprobs(LOGITS, settings), LOGITS.log_softmax(-1))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logprobs = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = draw(logprobs.expand(20_000, 4), uniforms).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, logprobs.exp(), atol=0.015, rtol=0)
    assert counts[1] == 0


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_a_token_without_probability_never_comes_at_the_edges(uniform: float) -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    assert draw(logprobs, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


def test_the_luck_of_a_row_is_its_own() -> None:
    together = row_uniforms([3, 4, 5], 7)
    assert torch.equal(together[1:2], row_uniforms([4], 7))
    assert not torch.equal(together[0], together[1])
