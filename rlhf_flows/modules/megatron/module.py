"""`MegatronModule`: a model that a group of ranks shares, each in a process of its own.

A subclass's `setup` makes the groups of its topology and says what this rank has of the model
(`make_groups`, `use_part`). What a subclass writes around a model of its own in `self.model`, as
ChatLearn's programs do, runs as it is: it is a `TorchModule` then. The ready-made trainers on
Megatron are in `rlhf_flows.models.megatron.trainers`.

The decision here: what a rank holds is never shown. Weights come and go whole, under their names in
the checkpoint, on all ranks at once (`is_sharded`), so that commits, syncs and averages know
nothing of topologies. megatron-core is imported by `make_groups` and what follows it only.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # of C

from rlhf_flows.errors import ConfigError
from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.hf_export import copy_description, write_weights
from rlhf_flows.modules.megatron.conversion import ShardedConversion
from rlhf_flows.modules.megatron.topology import Topology, model_parallel_groups
from rlhf_flows.modules.torch_module import TorchModule

__all__ = ["DecoderPart", "MegatronModule", "check_megatron"]

_TIMEOUT_S = 600.0
"""Of a collective, outside of a run."""


class DecoderPart(Protocol):
    """What a rank has of a model (`rlhf_flows.models.megatron.causal_lm.MegatronCausalLM`)."""

    @property
    def decoders(self) -> Sequence[Any]:
        """Its runs of layers."""

    @property
    def shape(self) -> DecoderShape: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def conversion(self) -> ShardedConversion: ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank, same order, to the end. Whole, by their checkpoint's names."""


class MegatronModule(TorchModule):
    """A `TorchModule` that may stand on Megatron."""

    part: DecoderPart | None = None
    groups: ExitStack
    """Megatron's, until it is closed."""

    def topology(self) -> Topology:
        """Of this replica's ranks: by `models.<name>`'s parallel sizes, which are ChatLearn's."""
        sizes = self.module_args
        return Topology(
            world_size=self.world_size,
            tensor_parallel=sizes.get("tensor_model_parallel_size") or 1,
            pipeline_parallel=sizes.get("pipeline_model_parallel_size") or 1,
        )

    def make_groups(self, topology: Topology) -> None:
        """Collective: every rank. Megatron's groups, for as long as this process lives.

        Raises ConfigError where megatron-core is not installed, or the ranks are not as many as the
        topology says; WaitTimeoutError where one of them does not come.
        """
        check_megatron()
        if not torch.distributed.is_initialized():
            assert self.world_size == 1, "the worker joins the ranks of a replica"
            torch.distributed.init_process_group(
                "nccl" if self.context.device.startswith("cuda") else "gloo",
                store=HashStore(),
                rank=0,
                world_size=1,
            )
        timeout_s = self.runtime_args.get("collective_timeout_s") or _TIMEOUT_S
        self.groups = ExitStack()
        self.groups.enter_context(model_parallel_groups(topology, timeout_s=timeout_s))

    def use_part(self, part: DecoderPart, *, folder: Path) -> None:
        """From here on this module is what its rank has of that model.

        Args:
            folder: Of the model: its configuration and tokenizer go with what is exported.
        """
        self.part, self._folder = part, folder
        self.model = nn.ModuleList(part.decoders)
        self.is_sharded = True

    # ---- place ------------------------------------------------------------------------------

    @property
    def data_parallel_rank(self) -> int:
        """Which of the whole models this rank has a part of."""
        if self.part is None:
            return super().data_parallel_rank
        from megatron.core import parallel_state

        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_parallel_size(self) -> int:
        if self.part is None:
            return super().data_parallel_size
        return self.part.topology.data_parallel

    # ---- weights ----------------------------------------------------------------------------

    def running_weights(self) -> Iterator[tuple[str, Tensor]]:
        """With a part: collective, every rank, same order, to the end; whole, on every rank."""
        if self.part is None:
            yield from super().running_weights()
        else:
            yield from self.part.named_weights()
            yield from self.extra_weights().items()

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """With a part: as `named_weights`, in float32."""
        if self.part is None:
            yield from super().trained_weights()
        else:
            yield from self._state().trained_weights()
            yield from self.extra_weights().items()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """With a part: collective, every rank, each given all of the weights, of which it keeps no
        more than its share at a time.

        Raises SyncError, with nothing changed on any rank, unless they fit exactly.
        """
        if self.part is None:
            super().load_weights(weights)
            return
        from rlhf_flows.modules.megatron.cpu import calling_megatron
        from rlhf_flows.modules.megatron.receiving import take_weights

        take_weights(
            self.part.decoders,
            self.part.shape,
            self.part.conversion,
            weights,
            extra=self.extra_weights(),
            module=self.name,
        )
        if self.optimizer is not None:
            # What it steps in place of weights of lower precision becomes the weights again.
            with calling_megatron(self.context.device):
                self.optimizer.reload_model_params()

    def save_pretrained(self, folder: Path) -> None:
        """With a part: collective, every rank; rank 0 writes, the others look on."""
        if self.part is None:
            super().save_pretrained(folder)
        elif self.rank == 0:
            self.export_weights(self.named_weights(), folder)
        else:
            deque(self.named_weights(), maxlen=0)

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        if self.part is None:
            super().export_weights(weights, folder)
            return
        extra = self.extra_weights().keys()
        dtype = next(self.parameters()).dtype
        copy_description(self._folder, folder, dtype=str(dtype).removeprefix("torch."))
        write_weights(((name, tensor) for name, tensor in weights if name not in extra), folder)

    def vocabulary_size(self) -> int:
        if self.part is None:
            return super().vocabulary_size()
        return self.part.shape.vocabulary_size

    # ---- training state ---------------------------------------------------------------------

    def state_files(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        if self.part is None:
            return super().state_files(folder, names)
        found: Sequence[str] = self._state().files(folder, names)
        return found

    def save_state(self, folder: Path) -> None:
        """With a part: collective, every rank writes files of its own. Of the optimizer that
        `self.optimizer` is, Megatron's, and of `self.lr_scheduler`.
        """
        if self.part is None:
            super().save_state(folder)
        else:
            self._state().save(folder)

    def load_state(self, folder: Path) -> None:
        """With a part: every rank takes its part of a state, whatever topology wrote it."""
        if self.part is None:
            super().load_state(folder)
        else:
            self._state().load(folder)

    def _state(self) -> Any:
        from rlhf_flows.modules.megatron.state import MegatronState

        assert self.part is not None
        return MegatronState(
            decoders=self.part.decoders,
            shape=self.part.shape,
            conversion=self.part.conversion,
            topology=self.part.topology,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            tensors=self.training_tensors(),
        )


def check_megatron() -> None:
    """Raises ConfigError where megatron-core is not installed; does not import it."""
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError(
            "megatron-core is not installed here: `pip install rlhf-flows[megatron]`, or train with"
            " backend='torch'"
        )
