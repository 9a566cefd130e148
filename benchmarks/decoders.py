"""Decoders of Qwen2's shape by size, with random weights, built where they are to run.

The decision here: nothing is read and nothing downloaded, so that a bare machine with a GPU can
build eight billion parameters in a second. The 25 M one is `small` of benchmarks/models.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_flows.modules.decoder_shape import DecoderShape

__all__ = ["SIZES", "build_megatron", "build_torch", "joined_alone", "qwen2_config"]

_ROTARY_BASE = 1_000_000.0


def _qwen2(
    *, width: int, mlp: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> DecoderShape:
    head = width // heads
    return DecoderShape(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_groups=groups,
        head_width=head,
        mlp_width=mlp,
        vocabulary_size=vocabulary,
        max_positions=32768,
        norm_eps=1e-6,
        activation="silu",
        rotary_frequencies=tuple(_ROTARY_BASE ** (-i / head) for i in range(0, head, 2)),
        tied=tied,
        qkv_bias=True,
        windows=(None,) * layers,
    )


SIZES: dict[str, DecoderShape] = {
    "toy": _qwen2(width=64, mlp=96, layers=2, heads=4, groups=2, vocabulary=320, tied=True),
    "25M": _qwen2(width=512, mlp=1408, layers=8, heads=8, groups=4, vocabulary=4096, tied=True),
    "150M": _qwen2(width=896, mlp=2432, layers=16, heads=14, groups=2, vocabulary=16384, tied=True),
    "1.5B": _qwen2(
        width=1536, mlp=8960, layers=28, heads=12, groups=2, vocabulary=151936, tied=True
    ),
    "7B": _qwen2(
        width=3584, mlp=18944, layers=28, heads=28, groups=4, vocabulary=152064, tied=False
    ),
}
"""The last two are Qwen2.5's own sizes."""


def qwen2_config(shape: DecoderShape) -> Any:
    """Of `transformers`."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_groups,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": _ROTARY_BASE},
        tie_word_embeddings=shape.tied,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )


def build_torch(
    shape: DecoderShape, *, dtype: torch.dtype, device: str, recompute: bool = False
) -> Any:
    """As the ready-made trainers have it, ready for their passes."""
    from transformers import Qwen2ForCausalLM
    from transformers.initialization import no_init_weights

    from rlhf_flows.models.causal_lm import made_ready
    from rlhf_flows.models.shared_prefix import ATTENTION

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model: Any = Qwen2ForCausalLM(qwen2_config(shape))
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(ATTENTION)
    model.tie_weights()
    _draw(model.named_parameters())
    return made_ready(model, device=device, gradient_checkpointing=recompute)


def build_megatron(
    shape: DecoderShape,
    topology: Any,
    *,
    dtype: torch.dtype,
    device: str,
    recompute: bool = False,
) -> Any:
    """This rank's part, as a `MegatronCausalLM`; the groups of `topology` are there."""
    from rlhf_flows.models.megatron.causal_lm import MegatronCausalLM
    from rlhf_flows.modules.megatron.conversion import MegatronConversion
    from rlhf_flows.modules.megatron.model import build_decoder

    decoders = build_decoder(shape, topology, dtype=dtype, device=device, recompute=recompute)
    for decoder in decoders:
        _draw(decoder.named_parameters())
    return MegatronCausalLM(
        decoders=decoders,
        shape=shape,
        topology=topology,
        conversion=MegatronConversion(shape, tensor_parallel=topology.tensor_parallel),
        device=device,
    )


@torch.no_grad()
def _draw(parameters: Iterator[tuple[str, nn.Parameter | Tensor]]) -> None:
    """Norms one, biases zero, matrices that keep the size of what goes through them: with smaller
    ones all logits are alike, and two models agree that compute different things. On the device.
    """
    for name, parameter in parameters:
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@contextmanager
def joined_alone(device: str) -> Iterator[Any]:
    """One process as all ranks of a Megatron model; gives the topology."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of C

    from rlhf_flows.modules.megatron.topology import Topology, model_parallel_groups
    from rlhf_flows.modules.rank_group import join_ranks

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    join_ranks(store, rank=0, world_size=1, timeout_s=60, device=device)
    topology = Topology()
    try:
        with model_parallel_groups(topology, timeout_s=60):
            yield topology
    finally:
        torch.distributed.destroy_process_group()
