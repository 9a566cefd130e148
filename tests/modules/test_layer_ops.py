from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_flows.modules import layer_ops
from rlhf_flows.modules.layer_ops import Activation, gated, rms_norm, rotate, swiglu


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return x.to(dtype).requires_grad_()


def agree(got: Tensor, expected: Tensor, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    upstream = random(*got.shape, seed=9).detach()
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    found = torch.autograd.grad((got * upstream).sum(), inputs)
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.fixture(params=[7, 2**18, "as on CUDA"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as on CUDA":
        monkeypatch.setattr(layer_ops, "_at_once", lambda x: True)
    else:
        monkeypatch.setattr(layer_ops, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_divides_by_the_root_of_the_mean_square(offset: float) -> None:
    x, w = random(2, 5, 6, seed=0), random(6, seed=1)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (w + offset)
    agree(rms_norm(x, w, eps=1e-6, offset=offset), expected, x, w)


def test_a_norm_in_bfloat16_is_rounded_once() -> None:
    x, w = random(40, 64, seed=0, dtype=torch.bfloat16), random(64, seed=1, dtype=torch.bfloat16)
    f = x.float()
    exact = f * (f.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w.float()
    assert torch.equal(rms_norm(x, w, eps=1e-6), exact.to(torch.bfloat16))


def test_a_rotation_is_the_one_of_transformers() -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    x = random(1, 5, 3, 8, seed=0)
    angles = random(1, 5, 4, seed=1).detach().repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    agree(rotate(x, cos, sin), expected.transpose(1, 2), x)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("rows", [1, 1300])
def test_swiglu_is_the_product_of_a_gate_and_what_it_gates(rows: int) -> None:
    x = random(1, rows, 6, seed=0)
    gate, up, down = random(9, 6, seed=1), random(9, 6, seed=2), random(6, 9, seed=3)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    agree(swiglu(x, gate, up, down), expected, x, gate, up, down, tolerance=2e-4)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(x, gate, up, down), expected, atol=1e-5, rtol=1e-5)


def test_swiglu_in_blocks_of_rows_sums_the_gradients_of_weights_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bfloat16 = torch.bfloat16
    x = random(4096, 16, seed=0, dtype=bfloat16)
    weights = [random(*s, seed=1, dtype=bfloat16) for s in ((24, 16), (24, 16), (16, 24))]
    found = []
    for elements in (2**30, 24 * 300):
        monkeypatch.setattr(layer_ops, "_CHUNK_ELEMENTS", elements)
        loss = swiglu(x, *weights).float().square().sum()
        found.append(torch.autograd.grad(loss, weights))
    for whole, blocks in zip(*found, strict=True):
        scale = float(whole.float().abs().max())
        torch.testing.assert_close(whole, blocks, atol=2**-7 * scale, rtol=0)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_what_is_gated_is_the_second_half(activation: Activation) -> None:
    x = random(1300, 2, 10, seed=0)
    gate, up = x.chunk(2, dim=-1)
    functional = torch.nn.functional
    gate = (
        functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    )
    agree(gated(x, activation), gate * up, x)
