"""How the ranks of one Megatron model share it, and the groups they talk in.

The decision here: everything that can be wrong with a topology is said before a rank starts, by
arithmetic alone; `megatron` is imported where groups are made and nowhere else in this file, so a
program may check a topology that another machine will run.

A rank's place is Megatron's own order: tensor parallel ranks are neighbours, then data parallel,
then pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlhf_flows.errors import ConfigError, WaitTimeoutError
from rlhf_flows.modules.decoder_shape import DecoderShape

__all__ = ["Topology", "model_parallel_groups"]

VOCABULARY_MULTIPLE = 64
"""Rows of the vocabulary on each tensor parallel rank: what matrix units like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The ranks of one model. Raises ConfigError where the numbers cannot be."""

    world_size: int = 1
    tensor_parallel: int = 1
    """Ranks that share every layer: each has part of its heads, of its MLP, of the vocabulary."""
    pipeline_parallel: int = 1
    """Stages, each with a run of the layers."""
    virtual_pipeline: int = 1
    """Runs of layers of each stage, interleaved: smaller bubbles for more messages."""
    sequence_parallel: bool = False
    """Whether tensor parallel ranks share the tokens where they do not share the layer."""

    def __post_init__(self) -> None:
        for name in ("world_size", "tensor_parallel", "pipeline_parallel", "virtual_pipeline"):
            if (found := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {found}, expected at least 1")
        model_ranks = self.tensor_parallel * self.pipeline_parallel
        if self.world_size % model_ranks:
            raise ConfigError(
                f"{self.world_size} ranks do not make whole models of {model_ranks}"
                f" (tensor_parallel {self.tensor_parallel} x pipeline_parallel"
                f" {self.pipeline_parallel}): give a multiple of {model_ranks} ranks"
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel < 2:
            raise ConfigError(
                f"virtual_pipeline is {self.virtual_pipeline}, which interleaves the stages of a"
                f" pipeline, and pipeline_parallel is {self.pipeline_parallel}: ask for at least 2"
            )
        if self.sequence_parallel and self.tensor_parallel < 2:
            raise ConfigError(
                "sequence_parallel shares tokens between tensor parallel ranks, and"
                f" tensor_parallel is {self.tensor_parallel}: ask for at least 2, or leave it off"
            )

    @property
    def data_parallel(self) -> int:
        """Whole models, each with its share of a batch."""
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel)

    def padded_vocabulary(self, vocabulary_size: int) -> int:
        """Rows of the embedding with those that no token has, alike on all tensor ranks."""
        multiple = VOCABULARY_MULTIPLE * self.tensor_parallel
        return -(-vocabulary_size // multiple) * multiple

    def check(self, shape: DecoderShape) -> None:
        """Raises ConfigError, with every number that does not divide, unless the model fits."""
        tensor, runs = self.tensor_parallel, self.pipeline_parallel * self.virtual_pipeline
        stages = f"pipeline_parallel {self.pipeline_parallel}" + (
            f" x virtual_pipeline {self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        )
        by_tensor = f"tensor_parallel {tensor}"
        problems = [
            f"{count} {what} by {by}"
            for what, count, share, by in (
                ("attention heads", shape.num_heads, tensor, by_tensor),
                ("key-value heads", shape.num_groups, tensor, by_tensor),
                ("MLP columns", shape.mlp_width, tensor, by_tensor),
                ("layers", shape.num_layers, runs, stages),
            )
            if count % share
        ]
        if problems:
            raise ConfigError(
                f"this model cannot be cut: {'; '.join(problems)} leaves a rest. Choose numbers"
                " that divide"
            )


@contextmanager
def model_parallel_groups(topology: Topology, *, timeout_s: float) -> Iterator[None]:
    """Collective: every rank, same order. Megatron's groups, for as long as it lasts.

    The ranks have joined one process group. There is one topology at a time in a process; another
    may follow.

    Raises:
        ConfigError: the process group is of another size than the topology.
        WaitTimeoutError: the groups were not made within `timeout_s`, which every collective in
            them has as well.
    """
    from megatron.core import parallel_state

    found = torch.distributed.get_world_size()
    if found != topology.world_size:
        raise ConfigError(
            f"the topology is of {topology.world_size} ranks, and {found} joined: start as many as"
            " it says"
        )
    stages = topology.virtual_pipeline
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor_parallel,
            pipeline_model_parallel_size=topology.pipeline_parallel,
            virtual_pipeline_model_parallel_size=stages if stages > 1 else None,
            distributed_timeout_minutes=timeout_s / 60,
        )
    except RuntimeError as cause:  # torch.distributed.DistError is one
        parallel_state.destroy_model_parallel()
        raise WaitTimeoutError(
            f"rank {torch.distributed.get_rank()} could not make the groups of {topology} with the"
            f" other ranks within {timeout_s:g} s: one of them is gone, or slow"
        ) from cause
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
