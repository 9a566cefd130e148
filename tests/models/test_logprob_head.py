from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_flows.models import logprob_head
from rlhf_flows.models.logprob_head import selected_logprobs


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=g, dtype=dtype).requires_grad_()
    # Two siblings draw the same first token from one row; row 3 is never scored.
    rows = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5])
    targets = torch.tensor([3, 3, 7, 0, 10, 1, 1, 2])
    return hidden, weight, rows, targets


def plain(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, t: float) -> Tensor:
    return ((hidden @ weight.T).float() / t).log_softmax(-1)[rows, targets]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [11, 22, 1000])
@pytest.mark.parametrize("kept", [0, 1000])
def test_logprobs_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int, kept: int
) -> None:
    monkeypatch.setitem(logprob_head._CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(logprob_head._KEPT_ELEMENTS, "cpu", kept)
    hidden, weight, rows, targets = inputs(torch.float32)
    upstream = torch.randn(8, generator=torch.Generator().manual_seed(1))
    expected = plain(hidden, weight, rows, targets, temperature)
    wanted = torch.autograd.grad((upstream * expected).sum(), (hidden, weight))
    got = selected_logprobs(hidden, weight, rows, targets, temperature=temperature).logprobs
    found = torch.autograd.grad((upstream * got).sum(), (hidden, weight))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(found, wanted)


def test_bfloat16_weights_give_float32_logprobs_and_bfloat16_gradients() -> None:
    hidden, weight, rows, targets = inputs(torch.bfloat16)
    logprobs = selected_logprobs(hidden, weight, rows, targets).logprobs
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain(hidden, weight, rows, targets, 1.0))
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, rows, targets = inputs(torch.float32)
    logprobs = selected_logprobs(hidden, weight.detach(), rows, targets).logprobs
    (gradient,) = torch.autograd.grad(logprobs.sum(), (hidden,))
    (wanted,) = torch.autograd.grad(plain(hidden, weight, rows, targets, 1.0).sum(), (hidden,))
    torch.testing.assert_close(gradient, wanted)
