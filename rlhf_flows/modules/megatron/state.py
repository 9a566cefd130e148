"""Training state of a Megatron model, saved by each rank and taken by any other topology.

Two decisions. What is saved is cut as the weights are (`ShardedConversion`), not as Megatron's
optimizers keep it: a rank that resumes cuts what it needs out of the files, without a word to the
others. And of ranks that have the same, or a part each (the distributed optimizer gives data
parallel ranks flat ranges of a parameter), one is chosen to write a parameter, so that all write
about as much; the ranges come to it one parameter at a time.

Megatron's own checkpoints keep their index as pickle, which nothing here reads from a store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_flows.modules.decoder_shape import DecoderShape
from rlhf_flows.modules.megatron.conversion import HEAD, ShardedConversion
from rlhf_flows.modules.megatron.optimizer import MOMENTS, HeldRange, held_ranges
from rlhf_flows.modules.megatron.topology import Topology
from rlhf_flows.modules.megatron.weights import exported_weights, global_parameters, whole_shapes
from rlhf_flows.modules.state_pieces import EXTRA_FILE, PieceReader, PieceWriter, Slice
from rlhf_flows.modules.torch_state import own_tensors, random_state, set_random_state

__all__ = ["MegatronState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronState:
    """What training of one rank's part keeps. The groups of its topology are there."""

    decoders: Sequence[Any]
    shape: DecoderShape
    conversion: ShardedConversion
    topology: Topology
    optimizer: Any
    """Megatron's, of torch's AdamW."""
    lr_scheduler: Any
    """With `state_dict` and `load_state_dict`, of JSON."""
    tensors: Mapping[str, Tensor]
    """What else is trained or kept, alike on all ranks."""

    @torch.no_grad()
    def save(self, folder: Path, *, max_file_bytes: int = 1 << 30) -> None:
        """Collective: every rank, same order, whose folders may be one. Writes this rank's files.

        A rank that cannot write takes part to the end, and raises then.
        """
        rank = torch.distributed.get_rank()
        writer = PieceWriter(folder, rank, max_file_bytes=max_file_bytes)
        failure: Exception | None = None
        slices = self._slices()
        for name, found, step in self._gathered():
            try:
                if failure is None:
                    self._add(writer, name, slices[name], found, step)
            except Exception as error:  # such as a full disk: others wait for this rank's part
                failure = error
        if failure is not None:
            raise failure
        numbers: dict[str, Tensor] = {}
        drawn = random_state(numbers)
        save_file(own_tensors(numbers), folder / _random_file(rank))
        if rank == 0 and self.tensors:
            save_file(own_tensors(self.tensors), folder / EXTRA_FILE)
        writer.close(
            {
                "world_size": torch.distributed.get_world_size(),
                "topology": asdict(self.topology),
                "kinds": self._kinds,
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "random": drawn,
                "extra": sorted(self.tensors),
            }
        )

    def files(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Of the files of a state, those that this rank reads; `folder` has its JSON already."""
        reader = PieceReader(folder)
        wanted = reader.files(s for slices in self._slices().values() for s in slices)
        wanted |= {EXTRA_FILE, _random_file(torch.distributed.get_rank())}
        return [name for name in names if name in wanted]

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Takes this rank's part of a state, whatever topology wrote it; the weights were loaded
        before. Random states are taken where topology and ranks are the same.

        Raises ConfigError, with nothing changed, where it is of another model or setting.
        """
        reader, slices = PieceReader(folder), self._slices()
        reader.check([s for found in slices.values() for s in found], self._kinds)
        extra = reader.extra(self.tensors)
        held = self._held()
        for name, parameter in self._parameters().items():
            if name not in held:
                continue
            parts = [reader.read(where, self._kinds) for where in slices[name]]
            whole = {
                kind: self._merged(name, parameter, [found[kind] for found, _ in parts])
                for kind in self._kinds
            }
            held[name].fill(whole, max(step for _, step in parts))
        self.lr_scheduler.load_state_dict(reader.about["lr_scheduler"])
        for name, tensor in self.tensors.items():
            tensor.copy_(extra[name])
        rank = torch.distributed.get_rank()
        if reader.about["topology"] == json.loads(json.dumps(asdict(self.topology))):
            found = load_file(folder / _random_file(rank))
            set_random_state(reader.indexes[rank]["random"], found)

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank, same order, to the end. As `exported_weights`, in the precision
        that the optimizer steps them in: what averages are made of.
        """
        kept, held, ranges = "master" in self._kinds, self._held(), self._ranges()
        group = parallel_state.get_data_parallel_group_gloo()
        ranks = torch.distributed.get_process_group_ranks(group)

        def master(name: str, parameter: Tensor) -> Tensor:
            size = parameter.numel()
            if all(places.get(name) == (0, size) for places in ranges):
                return held[name].main.detach()
            whole = torch.empty(size)
            for d, places in enumerate(ranges):
                if name in places:
                    start, stop = places[name]
                    if d == group.rank():
                        whole[start:stop] = held[name].main.detach().cpu()
                    torch.distributed.broadcast(whole[start:stop], ranks[d], group=group)
            return whole.view(parameter.shape).to(parameter.device)

        return exported_weights(
            self.decoders, self.shape, self.conversion, masters=master if kept else None
        )

    # ---- what is whose --------------------------------------------------------------------------

    @property
    def _kinds(self) -> list[str]:
        halves = any(p.dtype != torch.float32 for d in self.decoders for p in d.parameters())
        return [*(["master"] if halves else []), *MOMENTS]

    def _parameters(self) -> dict[str, Tensor]:
        """Those of this rank, in an order that is the same on all ranks of a stage."""
        own = global_parameters(self.decoders)
        return {name: own[name] for name in sorted(own)}

    def _slices(self) -> dict[str, list[Slice]]:
        """Of the checkpoint's weights, what each parameter is made of, in the order of `split`."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        found: dict[str, list[Slice]] = {}
        for name, parameter in self._parameters().items():
            shapes = whole_shapes(name, parameter, self.shape, self.conversion)
            pieces = self.conversion.split(name, parameter.detach())
            found[name] = [
                Slice(name=part.name, axis=None, start=0, stop=0, shape=shapes[part.name])
                if part.axis is None
                else Slice(
                    name=part.name,
                    axis=part.axis,
                    # The vocabulary is padded: a rank may have less than its share, or nothing.
                    start=min(rank * piece.shape[part.axis], shapes[part.name][part.axis]),
                    stop=min((rank + 1) * piece.shape[part.axis], shapes[part.name][part.axis]),
                    shape=shapes[part.name],
                )
                for part, (_, piece) in zip(self.conversion.parts(name), pieces, strict=True)
            ]
        return found

    def _merged(self, name: str, parameter: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The padding of a vocabulary is zero, and learns nothing."""
        padded = []
        for (_, like), part in zip(
            self.conversion.split(name, parameter.detach()), parts, strict=True
        ):
            missing = like.shape[0] - part.shape[0]
            padded.append(
                torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            )
        return self.conversion.merge(name, padded)

    def _add(
        self,
        writer: PieceWriter,
        name: str,
        slices: Sequence[Slice],
        found: Mapping[str, Tensor],
        step: int,
    ) -> None:
        split = {kind: self.conversion.split(name, tensor) for kind, tensor in found.items()}
        for place, where in enumerate(slices):
            if where.axis is None or where.stop > where.start:
                rows = where.piece_shape[0]
                tensors = {kind: pieces[place][1][:rows] for kind, pieces in split.items()}
                writer.add(where, tensors, step=step)

    def _held(self) -> dict[str, HeldRange]:
        return held_ranges(self._parameters(), self.optimizer)

    def _ranges(self) -> list[dict[str, tuple[int, int]]]:
        """Collective. What of each parameter each data parallel rank's optimizer has."""
        group = parallel_state.get_data_parallel_group_gloo()
        ranges: list[Any] = [None] * group.size()
        own = {name: (h.start, h.stop) for name, h in self._held().items()}
        torch.distributed.all_gather_object(ranges, own, group=group)
        return ranges

    def _writers(self) -> dict[str, int | None]:
        """For each parameter, the data parallel rank that writes this tensor rank's part; None for
        what another tensor rank writes, or another stage.
        """
        tensor, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        loads = [[0] * self.topology.data_parallel for _ in range(size)]
        writers: dict[str, int | None] = {}
        for name, parameter in self._parameters().items():
            writers[name] = None
            if name == HEAD and self.shape.tied:
                continue  # the copy of the embedding that the last stage has
            if all(part.axis is None for part in self.conversion.parts(name)):
                places = [(t, d) for t in range(size) for d in range(len(loads[t]))]
                choices = [min(places, key=lambda place: loads[place[0]][place[1]])]
            else:
                choices = [(t, loads[t].index(min(loads[t]))) for t in range(size)]
            for t, d in choices:
                loads[t][d] += parameter.numel()
                if t == tensor:
                    writers[name] = d
        return writers

    def _gathered(self) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """Collective over data parallel ranks, to the end: the parameters that this rank writes,
        with their tensors by kind, of the parameter's shape, and the number of steps.
        """
        group = parallel_state.get_data_parallel_group_gloo()
        ranks, mine = torch.distributed.get_process_group_ranks(group), group.rank()
        kinds, held, parameters = self._kinds, self._held(), self._parameters()
        ranges = self._ranges()
        for name, writer in self._writers().items():
            if writer is None:
                continue
            size = parameters[name].numel()
            is_shared = ranges[writer].get(name) != (0, size)
            if writer != mine:
                if is_shared and name in held:
                    numbers, step = held[name].tensors(kinds)
                    steps = torch.tensor([step])
                    torch.distributed.send(steps, ranks[writer], group=group)
                    torch.distributed.send(numbers, ranks[writer], group=group)
                continue
            whole, steps = torch.empty(len(kinds), size), torch.zeros(1, dtype=torch.int64)
            for d, places in enumerate(ranges):
                if name not in places or (d != mine and not is_shared):
                    continue
                start, stop = places[name]
                if d == mine:
                    whole[:, start:stop], steps[0] = held[name].tensors(kinds)
                else:
                    numbers = torch.empty(len(kinds), stop - start)
                    torch.distributed.recv(steps, ranks[d], group=group)
                    torch.distributed.recv(numbers, ranks[d], group=group)
                    whole[:, start:stop] = numbers
            shaped = [row.view(parameters[name].shape) for row in whole]
            yield name, dict(zip(kinds, shaped, strict=True)), int(steps[0])


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"
