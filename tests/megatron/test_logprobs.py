"""Logprobs over a shared vocabulary are those of plain log_softmax over the whole of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rlhf_flows.models.megatron import logprobs
from rlhf_flows.models.megatron.logprobs import vocabulary_parallel_logprobs
from tests.megatron.ranks import Ranks

U, D, V = 9, 6, 70


@pytest.fixture(params=[2**21, V, 3 * V], ids=["one chunk", "rows alone", "three rows"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", request.param)
    return


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(U, D, requires_grad=True)
    padded = torch.cat([torch.randn(V, D), torch.full((58, D), 5.0)]).requires_grad_()
    return hidden, padded, torch.randint(V, (U,))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_of_the_vocabulary_takes_no_probability_and_gets_no_gradient(
    temperature: float,
) -> None:
    hidden, padded, targets = inputs()
    weights = torch.randn(U)
    scored = vocabulary_parallel_logprobs(
        hidden, padded, targets, vocabulary_size=V, temperature=temperature, entropy=True
    )
    found = torch.autograd.grad((scored.logprobs * weights).sum(), (hidden, padded))

    whole = ((hidden @ padded[:V].T) / temperature).log_softmax(-1)  # [U, V]
    expected = whole.gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * weights).sum(), (hidden, padded))
    torch.testing.assert_close(scored.logprobs, expected)
    assert scored.entropy is not None
    torch.testing.assert_close(scored.entropy, -(whole.exp() * whole).sum(-1))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found[1][V:].any()


def test_nothing_kept_for_the_backward_pass_is_written_to() -> None:
    hidden, padded, targets = inputs()
    scored = vocabulary_parallel_logprobs(hidden, padded, targets, vocabulary_size=V)
    first = torch.autograd.grad(scored.logprobs.sum(), (hidden, padded), retain_graph=True)
    second = torch.autograd.grad(scored.logprobs.sum(), (hidden, padded))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_share_the_vocabulary_agree_with_one_that_has_it_all(
    world_size: int, ranks: Ranks
) -> None:
    """Of four ranks the last two have padding alone."""
    found = ranks.run("tests.megatron.checks:shared_vocabulary", world_size=world_size)
    assert max(max(differences) for differences in found) < 2e-6
