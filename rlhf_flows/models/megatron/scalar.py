"""A Hugging Face model with a scalar head as Megatron runs it: values, and rewards.

The decision here: it is the decoder of a causal model that ends in `score`, so everything but the
head is the same code; what a folder may be, and what a new head is filled with, is what
`scalar_model` says for torch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_flows.data.batch import Batch
from rlhf_flows.models.causal_lm import DType
from rlhf_flows.models.megatron.causal_lm import MegatronCausalLM, built, described
from rlhf_flows.models.scalar_model import HeadInit, check_scalar_folder, make_head, one_longer
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.megatron.topology import Topology

__all__ = ["check_megatron_scalar_folder", "load_megatron_scalar", "with_ends"]


def check_megatron_scalar_folder(path: str | Path, topology: Topology) -> DecoderShape:
    """What Megatron would build of the folder, a causal model's or one with a head of one label; no
    weights are read, no Megatron loaded.

    Raises ConfigError that names what cannot be built, or cannot be cut so.
    """
    shape, _ = _described(check_scalar_folder(path))
    topology.check(shape)
    return shape


def load_megatron_scalar(
    path: str | Path,
    topology: Topology,
    *,
    head_init: HeadInit,
    dtype: DType = "float32",
    device: str = "cpu",
    recompute: bool = False,
) -> MegatronCausalLM:
    """This rank's part, with its weights; the groups of `topology` are there. The head is the
    folder's where it has one, else new, as `load_scalar_model` makes it.

    Raises ConfigError as `check_megatron_scalar_folder`, or where weights are missing.
    """
    folder = check_scalar_folder(path)
    shape, config = _described(folder)
    fill = partial(make_head, init=head_init)
    return built(
        folder,
        shape,
        config,
        topology,
        dtype=dtype,
        device=device,
        recompute=recompute,
        make_head=fill,
    )


def with_ends(samples: Batch) -> Batch:
    """Samples whose passes reach the last token of each response too: for `last_scores_of`."""
    return {**samples, "response_ids": one_longer(samples["response_ids"])}


def _described(folder: HFFolder) -> tuple[DecoderShape, Any]:
    shape, config = described(folder)
    return replace(shape, scalar_head=True, tied=False), config
