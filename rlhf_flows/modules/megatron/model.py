"""A decoder as Megatron's GPTModel, cut by a topology: this rank's runs of layers.

The decision here: the model ends with its last hidden states. What is scored from them, and at
which tokens, is the affair of `rlhf_flows.models.megatron.logprobs`: logits of all tokens, most of
them prompt, are never made.

Letters: T packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    model_parallel_cuda_manual_seed,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.megatron.cpu import calling_megatron
from rlhf_flows.modules.megatron.layers import GatedMLP, PackedAttention, PackedTexts, RMSNorm
from rlhf_flows.modules.megatron.topology import Topology

__all__ = ["Decoder", "build_decoder", "hidden_states", "packed_texts", "transformer_config"]

_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Decoder(GPTModel):  # type: ignore[misc]  # has no types
    """One run of layers; the last gives hidden states [T, 1, D], or this rank's share of them."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:  # [V of this rank, D]
        """Of the last run: the rows of the language-model head that this rank has."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def end_in_a_score(self) -> None:
        """Puts a scalar head in the place of the vocabulary's, which was not filled yet.

        All tensor parallel ranks have all of it, and no mark of a share: its gradient is whole on
        each of them, and counts once for the norm.
        """
        del self.output_layer
        self.score = nn.Linear(
            self.config.hidden_size, 1, bias=False, dtype=self.config.params_dtype
        ).to(next(self.parameters()).device)


def build_decoder(
    shape: DecoderShape,
    topology: Topology,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    recompute: bool = False,
) -> list[Decoder]:
    """This rank's runs of layers, in order; its groups were made (`model_parallel_groups`).

    Weights are whatever the memory held: load them (`weights.py`). With `recompute` the
    activations of a layer are computed again in the backward pass.

    Raises ConfigError where the topology does not divide the shape.
    """
    topology.check(shape)
    config = transformer_config(shape, topology, dtype=dtype, device=device, recompute=recompute)
    runs = topology.virtual_pipeline
    stages = range(runs) if runs > 1 else [None]
    if torch.device(device).type == "cuda":
        # Megatron makes its weights on the current device, and names states of its generators that
        # sequence parallel layers and recomputation look up, though nothing here draws from them.
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)
        model_parallel_cuda_manual_seed(0)
    with calling_megatron(device):
        return [_run_of_layers(shape, topology, config, stage) for stage in stages]


def _run_of_layers(
    shape: DecoderShape, topology: Topology, config: Any, vp_stage: int | None
) -> Decoder:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = partial(
        PackedAttention, windows=shape.windows, frequencies=shape.rotary_frequencies
    )
    layer.submodules.mlp = GatedMLP
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    decoder = Decoder(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage),
            layer_norm=RMSNorm,
        ),
        vocab_size=topology.padded_vocabulary(shape.vocabulary_size),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",  # `PackedAttention` rotates
        vp_stage=vp_stage,
    )
    if last and shape.scalar_head:
        decoder.end_in_a_score()
    _mark_shares(decoder)
    if first:
        decoder.embedding.register_forward_hook(partial(_embedded, shape=shape), with_kwargs=True)
    return decoder


def _mark_shares(decoder: nn.Module) -> None:
    """Marks parameters of which tensor parallel ranks have different parts.

    Megatron does so where it initializes weights, which is left out here; without the mark only the
    first rank's part counts for the norm of all gradients.
    """
    for module in decoder.modules():
        by_rows = isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding))
        weight = getattr(module, "weight", None)
        if weight is not None and (by_rows or isinstance(module, RowParallelLinear)):
            set_tensor_model_parallel_attributes(weight, True, 0 if by_rows else 1, 1)


def _embedded(
    module: nn.Module,
    inputs: Any,
    named: Any,
    output: Tensor,  # [T, 1, D], or this rank's share of the T
    *,
    shape: DecoderShape,
) -> Tensor:
    """What Megatron's embedding leaves out of those of `transformers`."""
    if shape.padding_token is not None:
        tokens = named["input_ids"][0]
        if len(output) < len(tokens):
            tokens = tokens.split(len(output))[parallel_state.get_tensor_model_parallel_rank()]
        is_padding = (tokens == shape.padding_token)[:, None, None]
        output = torch.where(is_padding, output.detach(), output)
    if shape.embedding_scale != 1.0:
        # The factor is rounded first, as the models that have one were trained.
        output = output * torch.tensor(
            shape.embedding_scale, dtype=output.dtype, device=output.device
        )
    return output


def transformer_config(
    shape: DecoderShape,
    topology: Topology,
    *,
    dtype: torch.dtype,
    device: str,
    recompute: bool = False,
) -> Any:
    """Megatron's own, with what it needs to be right for packed texts without Transformer Engine.

    Fusions that want APEX or Transformer Engine stay off, as they are by default.
    """
    interleaved = topology.virtual_pipeline > 1
    staged = topology.pipeline_parallel > 1
    again: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.width,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.mlp_width,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.zero_centered_norms,
        qk_layernorm=shape.qk_norm,
        activation_func=_ACTIVATIONS[shape.activation],
        gated_linear_unit=True,
        add_bias_linear=shape.all_biases,
        add_qkv_bias=shape.qkv_bias or shape.all_biases,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor_parallel,
        pipeline_model_parallel_size=topology.pipeline_parallel,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline if interleaved else None,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=torch.device(device).type == "cpu",
        perform_initialization=False,
        # Losses come summed: nothing of Megatron's divides them.
        calculate_per_token_loss=True,
        # Packed micro-batches are of any length. The dispatcher of experts, of which there are
        # none, is asked for because Megatron refuses its default beside lengths that vary.
        variable_seq_lengths=staged,
        moe_token_dispatcher_type="alltoall",
        # Batched messages between two interleaved stages arrive at the wrong run of layers, and
        # nothing says so.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=torch.device(device).type == "cuda",
        **(again if recompute else {}),
    )


def packed_texts(
    lengths: Sequence[int], *, multiple: int = 1, device: str = "cpu"
) -> tuple[Any, int]:
    """How Megatron is told of packed texts of these lengths, and T, padded to a multiple.

    Tokens of the padding are a text of their own, which nothing sees.
    """
    assert min(lengths) > 0
    padding = -sum(lengths) % multiple
    whole = (*lengths, padding) if padding else tuple(lengths)
    return PackedTexts.of(whole, device=device), sum(whole)


def hidden_states(decoder: Any, tokens: Tensor, packed: Any) -> Tensor:  # [1, T]
    """What a run of layers makes of packed tokens; `decoder` may stand in a wrapper.

    Positions count from 0 in each text: Megatron takes them from the lengths of the packed texts.
    """
    hidden: Tensor = decoder(
        input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=packed
    )
    return hidden
