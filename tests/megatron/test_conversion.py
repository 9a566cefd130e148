from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.megatron.conversion import MegatronConversion

HEADS, GROUPS, W, D, F = 6, 2, 4, 8, 10
SHAPE = DecoderShape(
    num_layers=2,
    width=D,
    num_heads=HEADS,
    num_groups=GROUPS,
    head_width=W,
    mlp_width=F,
    vocabulary_size=12,
    max_positions=16,
    norm_eps=1e-6,
    activation="silu",
    rotary_frequencies=(1.0, 0.1),
    tied=False,
    windows=(None, None),
)
QKV = "decoder.layers.1.self_attention.linear_qkv"


def queries_keys_values(*rest: int) -> list[Tensor]:
    return [torch.randn(heads * W, *rest) for heads in (HEADS, GROUPS, GROUPS)]


@pytest.mark.parametrize(("kind", "rest"), [("weight", (D,)), ("bias", ())])
def test_queries_stand_beside_the_key_and_value_that_they_see(
    kind: str, rest: tuple[int, ...]
) -> None:
    q, k, v = queries_keys_values(*rest)
    heads: list[Tensor] = []
    for group in range(GROUPS):
        for head in range(3 * group, 3 * group + 3):
            heads += q[head * W : (head + 1) * W]
        heads += k[group * W : (group + 1) * W]
        heads += v[group * W : (group + 1) * W]
    packed = MegatronConversion(SHAPE).merge(f"{QKV}.{kind}", [q, k, v])
    assert torch.equal(packed, torch.stack(heads))


@pytest.mark.parametrize("name", [f"{QKV}.weight", "decoder.layers.0.mlp.linear_fc1.weight"])
def test_shares_of_ranks_are_the_conversions_of_their_shares(name: str) -> None:
    """Cutting each tensor and packing it is packing it and cutting what Megatron would."""
    whole, share = MegatronConversion(SHAPE), MegatronConversion(SHAPE, tensor_parallel=2)
    parts = queries_keys_values(D) if "qkv" in name else [torch.randn(F, D) for _ in range(2)]
    packed = whole.merge(name, parts)
    shares = [share.merge(name, [part.chunk(2)[rank] for part in parts]) for rank in range(2)]
    if "qkv" in name:
        assert torch.equal(torch.cat(shares), packed)
    else:
        gate, up = packed.chunk(2)
        assert torch.equal(shares[1], torch.cat([gate.chunk(2)[1], up.chunk(2)[1]]))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f"{QKV}.weight", queries_keys_values(D)),
        (f"{QKV}.bias", queries_keys_values()),
        ("decoder.layers.0.mlp.linear_fc1.bias", [torch.randn(F), torch.randn(F)]),
        ("decoder.layers.0.mlp.linear_fc2.weight", [torch.randn(D, F)]),
        ("embedding.word_embeddings.weight", [torch.randn(12, D)]),
    ],
)
def test_what_is_merged_splits_into_the_same_bits(name: str, parts: list[Tensor]) -> None:
    conversion = MegatronConversion(SHAPE)
    found = conversion.split(name, conversion.merge(name, parts))
    assert [n for n, _ in found] == [p.name for p in conversion.parts(name)]
    assert all(torch.equal(f, p) for (_, f), p in zip(found, parts, strict=True))


def test_only_summed_matrices_are_cut_by_columns_and_their_biases_not_at_all() -> None:
    conversion = MegatronConversion(SHAPE)
    for module, name in (
        ("self_attention.linear_proj", "self_attn.o_proj"),
        ("mlp.linear_fc2", "mlp.down_proj"),
    ):
        (weight,) = conversion.parts(f"decoder.layers.0.{module}.weight")
        (bias,) = conversion.parts(f"decoder.layers.0.{module}.bias")
        assert weight == (f"model.layers.0.{name}.weight", 1)
        assert bias == (f"model.layers.0.{name}.bias", None)
