"""Training state of a model that ranks share, in files that each of them writes for itself.

The decision here: state is kept under the names of the checkpoint's weights, cut along one axis
each, so the files say nothing of who trained, and any number of ranks reads what it needs from
whichever files hold it. Tensors are safetensors, all else JSON: nothing that is read can run code.

A rank writes `state-RANK-FILE.safetensors` with tensors `NAME/KIND`, and `state-RANK.json`, which
says what is where. Kinds are `exp_avg`, `exp_avg_sq` and, where weights are of lower precision than
what the optimizer steps, `master`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_flows.errors import ConfigError

__all__ = ["EXTRA_FILE", "Piece", "PieceReader", "PieceWriter", "Slice"]

EXTRA_FILE = "extra.safetensors"
"""Tensors that are no weight's, alike on all ranks: rank 0 writes them."""
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Of one weight of the checkpoint."""

    name: str
    axis: int | None
    """That is cut; None: all of it."""
    start: int
    stop: int
    """Along the axis; 0 and 0 where it is not cut."""
    shape: tuple[int, ...]
    """Of the whole weight."""

    @property
    def piece_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return self.shape
        return (
            *self.shape[: self.axis],
            self.stop - self.start,
            *self.shape[self.axis + 1 :],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A slice that a file holds, of each kind."""

    slice: Slice
    step: int
    """Of AdamW: how often this weight was stepped."""
    file: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Piece:
        where = entry["slice"]
        return cls(
            slice=Slice(**{**where, "shape": tuple(where["shape"])}),
            step=int(entry["step"]),
            file=entry["file"],
        )


class PieceWriter:
    """One rank's files. What it holds in memory is one file."""

    def __init__(self, folder: Path, rank: int, *, max_file_bytes: int) -> None:
        self._folder, self._rank = folder, rank
        self._max_file_bytes = max_file_bytes
        self._pieces: list[Piece] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._num_files = 0

    def add(self, where: Slice, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """`tensors` are by kind, of `where.piece_shape`; they are copied."""
        for kind, tensor in tensors.items():
            assert tuple(tensor.shape) == where.piece_shape
            self._held[f"{where.name}/{kind}"] = tensor.detach().cpu().clone().contiguous()
            self._held_bytes += tensor.nbytes
        self._pieces.append(Piece(slice=where, step=step, file=self._file))
        if self._held_bytes >= self._max_file_bytes:
            self._flush()

    @property
    def _file(self) -> str:
        return f"state-{self._rank:05d}-{self._num_files:05d}.safetensors"

    def _flush(self) -> None:
        if self._held:
            save_file(self._held, self._folder / self._file)
            self._held, self._held_bytes = {}, 0
            self._num_files += 1

    def close(self, about: Mapping[str, Any]) -> None:
        """`about` is what else is to be known, alike on all ranks but for what is a rank's own."""
        self._flush()
        index = {
            "format": _FORMAT,
            "rank": self._rank,
            **about,
            "pieces": [asdict(piece) for piece in self._pieces],
        }
        (self._folder / f"state-{self._rank:05d}.json").write_text(json.dumps(index), "utf-8")


class PieceReader:
    """The state that a folder holds, whoever wrote it.

    Raises ConfigError where it holds none, or lacks the index of a rank that wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = [json.loads(f.read_text("utf-8")) for f in sorted(folder.glob("state-*.json"))]
        if not found:
            raise ConfigError(
                f"{str(folder)!r} holds no training state of a model that ranks share"
                " (state-RANK.json): give a folder that save_state of such a module wrote"
            )
        self.indexes: dict[int, Mapping[str, Any]] = {int(i["rank"]): i for i in found}
        """What each rank wrote, its own beside what is alike on all."""
        self.about = self.indexes[min(self.indexes)]
        newer = [i["format"] for i in found if i["format"] != _FORMAT]
        missing = set(range(int(self.about["world_size"]))) - set(self.indexes)
        if newer or missing:
            what = (
                f"is of format {newer[0]}, known is {_FORMAT}"
                if newer
                else f"lacks what rank {min(missing)} of {self.about['world_size']} wrote"
            )
            raise ConfigError(
                f"the training state in {str(folder)!r} {what}: go back to an older checkpoint"
            )
        self._pieces: dict[str, list[Piece]] = {}
        for index in found:
            for entry in index["pieces"]:
                piece = Piece.from_json(entry)
                self._pieces.setdefault(piece.slice.name, []).append(piece)

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether the state in a folder is one of pieces."""
        return any(folder.glob("state-*.json"))

    def whole(self, name: str, shape: Sequence[int]) -> Slice:
        """All of a weight, for who has it uncut."""
        pieces = self._pieces.get(name)
        axis = pieces[0].slice.axis if pieces else None
        stop = 0 if axis is None else shape[axis]
        return Slice(name=name, axis=axis, start=0, stop=stop, shape=tuple(shape))

    def files(self, slices: Iterable[Slice]) -> set[str]:
        """Those that hold any of these slices."""
        return {piece.file for where in slices for piece in self._pieces_of(where)}

    def check(self, slices: Iterable[Slice], kinds: Collection[str]) -> None:
        """Raises ConfigError unless all of these slices, of these kinds, are there."""
        kept = self.about["kinds"]
        if set(kept) != set(kinds):
            raise ConfigError(
                f"the training state in {str(self._folder)!r} keeps {', '.join(kept)} of each"
                f" weight, this model {', '.join(kinds)}: resume in the precision of the weights"
                " that the run began with"
            )
        for where in slices:
            covered = sum(_overlap(where, piece) for piece in self._pieces_of(where))
            if covered != _length(where):
                raise ConfigError(
                    f"the training state in {str(self._folder)!r} has {covered} of the"
                    f" {_length(where)} rows or columns of {where.name!r}: a file's index is"
                    " damaged; go back to an older checkpoint"
                )

    def _pieces_of(self, where: Slice) -> Sequence[Piece]:
        pieces = self._pieces.get(where.name, [])
        wrong = [p for p in pieces if (p.slice.shape, p.slice.axis) != (where.shape, where.axis)]
        if not pieces or wrong:
            found = f"one of {list(wrong[0].slice.shape)}" if wrong else "none"
            raise ConfigError(
                f"the training state in {str(self._folder)!r} has {found} for the weight"
                f" {where.name!r} of shape {list(where.shape)}: it belongs to another model"
            )
        return [p for p in pieces if _overlap(where, p)]

    def extra(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is no weight's, by the names of `tensors`. Raises ConfigError for other names."""
        if self.about.get("extra", []) != sorted(tensors):
            raise ConfigError(
                f"the training state in {str(self._folder)!r} has beside optimizer and schedule"
                f" {self.about.get('extra', [])}, this module {sorted(tensors)}: it belongs to"
                " another module or setting"
            )
        return load_file(self._folder / EXTRA_FILE) if tensors else {}

    def read(self, where: Slice, kinds: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """By kind, of `where.piece_shape`; and the number of steps. `check` found it there."""
        parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        pieces = sorted(self._pieces_of(where), key=lambda piece: piece.slice.start)
        for piece in pieces:
            with safe_open(self._folder / piece.file, framework="pt") as file:
                for kind in kinds:
                    parts[kind].append(_cut(file.get_slice(f"{where.name}/{kind}"), where, piece))
        axis = where.axis or 0
        tensors = {k: torch.cat(found, axis) if found else torch.empty(where.piece_shape)
                   for k, found in parts.items()}  # fmt: skip
        return tensors, max((piece.step for piece in pieces), default=0)


def _length(where: Slice) -> int:
    return 1 if where.axis is None else where.stop - where.start


def _overlap(where: Slice, piece: Piece) -> int:
    if where.axis is None:
        return 1
    start, stop = max(where.start, piece.slice.start), min(where.stop, piece.slice.stop)
    return max(0, stop - start)


def _cut(held: Any, where: Slice, piece: Piece) -> Tensor:
    if where.axis is None:
        whole: Tensor = held[...]
        return whole
    start = max(where.start, piece.slice.start) - piece.slice.start
    stop = min(where.stop, piece.slice.stop) - piece.slice.start
    cut: Tensor = held[(*(slice(None),) * where.axis, slice(start, stop))]
    return cut
