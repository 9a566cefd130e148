"""`TorchModule`: a model in plain PyTorch, one process or data-parallel ranks.

A subclass's `setup` sets `self.model`, and `self.optimizer` and `self.lr_scheduler` where it
trains; everything else here follows from these. Two decisions: weights are checked by name, shape
and dtype before the first of them changes, so weights of another model change nothing; and the
training state is safetensors and JSON (modules/torch_state.py), never pickle, exact to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_flows.errors import ConfigError, NonFiniteError, SyncError
from rlhf_flows.modules.base import BaseModule, TakeWeights, TensorKind
from rlhf_flows.modules.conversion import Conversion
from rlhf_flows.modules.hf_export import write_weights
from rlhf_flows.modules.state_pieces import PieceReader
from rlhf_flows.modules.torch_state import (
    load_pieces,
    load_training_state,
    save_training_state,
)

__all__ = ["TorchModule", "is_overridden", "kind_of"]


class TorchModule(BaseModule):
    """A torch model with what a run asks of it: weights in and out, training state, probes.

    Ranks of one replica are data-parallel: each gets the whole global batch, works on its share,
    and `sum_gradients` makes the gradients whole. Their process group is the worker's affair.
    """

    takes_any_dtype: ClassVar[bool] = False
    """Whether weights in another precision than the model's are taken, and cast."""

    model: Any
    optimizer: Any = None
    lr_scheduler: Any = None
    tokenizer: Any = None
    master_weights: dict[str, Tensor] | None = None
    """Float32 copies that the optimizer steps, by parameter name; part of the training state."""
    conversion: Conversion | None = None
    """Between the model's parameters and its checkpoint's, where they differ: weights come and go
    by the checkpoint's names and shapes."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the model."""
        parameters: Iterator[nn.Parameter] = self._model().parameters()
        return parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the model."""
        parameters: Iterator[tuple[str, nn.Parameter]] = self._model().named_parameters()
        return parameters

    # ---- weights --------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers in the model's order; tied ones under their first name.

        Names and shapes are those of a checkpoint. The tensors are the model's own, detached: copy
        what must outlive the next step.
        """
        for name, tensor in self.running_weights():
            yield from self._parts(name, tensor)

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 masters in place of the weights that have one."""
        masters = self.master_weights or {}
        for name, tensor in self.running_weights():
            yield from self._parts(name, masters.get(name, tensor).detach())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights. Raises SyncError, with nothing changed, unless they fit exactly."""
        given = list(weights)
        with self._filling([kind_of(name, tensor) for name, tensor in given]) as take:
            take(given)

    def receiving_weights(self, kinds: Sequence[TensorKind]) -> AbstractContextManager[TakeWeights]:
        """Copies each weight as it comes. Of a weight that the model keeps together with others
        (`conversion`), a copy is held until these have come.
        """
        # A subclass that has a `load_weights` of its own, and knows nothing of this.
        if is_overridden(type(self), "load_weights", beside="receiving_weights"):
            return self._collecting()
        return self._filling(kinds)

    @contextmanager
    def _filling(self, kinds: Sequence[TensorKind]) -> Iterator[TakeWeights]:
        self._check_weights(kinds)
        targets = [
            *self.running_weights(),
            *((name, master) for name, master in (self.master_weights or {}).items()),
        ]
        wanted: dict[str, list[_Target]] = {}
        for name, tensor in targets:
            target = _Target(name, tensor, tuple(part for part, _ in self._parts(name, tensor)))
            for part in target.parts:
                wanted.setdefault(part, []).append(target)

        @torch.no_grad()
        def take(weights: Sequence[tuple[str, Tensor]]) -> None:
            touched: dict[int, _Target] = {}
            for part, tensor in weights:
                for target in wanted.pop(part):
                    target.given[part] = tensor
                    touched[id(target)] = target
                    if len(target.given) == len(target.parts):
                        self._fill(target)
                        del touched[id(target)]
            for target in touched.values():
                target.given = {part: tensor.clone() for part, tensor in target.given.items()}

        yield take
        assert not wanted, f"{len(wanted)} weights did not come"

    def _check_weights(self, kinds: Sequence[TensorKind]) -> None:
        own = {kind[0]: kind[1:] for kind in starmap(kind_of, self.named_weights())}
        given: dict[str, tuple[str, tuple[int, ...]]] = {}
        problems: list[str] = []
        for name, dtype, shape in kinds:
            if name in given:
                problems.append(f"{name} came twice")
            given[name] = (dtype, shape)
        problems += [f"{name} is missing" for name in own if name not in given]
        problems += [f"{name} is not in the model" for name in given if name not in own]
        for name in own.keys() & given.keys():
            (dtype, shape), (found, its_shape) = own[name], given[name]
            if shape != its_shape or not (dtype == found or self.takes_any_dtype):
                problems.append(
                    f"{name} is {found} {list(its_shape)}, expected {dtype} {list(shape)}"
                )
        if problems:
            shown = "; ".join(sorted(problems)[:8])
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise SyncError(
                f"module {self.name!r} cannot take these weights: {shown}{more}. Nothing was"
                " changed: send the weights of the same model in the same dtype"
            )

    def running_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As `named_weights`, in names and shapes of the model as it runs."""
        seen: set[int] = set()
        for name, tensor in self._model().state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()
        yield from self.extra_weights().items()

    def extra_weights(self) -> Mapping[str, Tensor]:
        """What is to travel with the model's weights, last; filled in place where they are taken.
        A subclass adds its own.
        """
        return {}

    def _parts(self, name: str, tensor: Tensor) -> Sequence[tuple[str, Tensor]]:
        return [(name, tensor)] if self.conversion is None else self.conversion.split(name, tensor)

    def _fill(self, target: _Target) -> None:
        parts = [target.given[part] for part in target.parts]
        target.tensor.copy_(self._merged(target.name, parts))

    def _merged(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if self.conversion is None else self.conversion.merge(name, parts)

    def save_pretrained(self, folder: Path) -> None:
        """The Hugging Face folder where the model is one of theirs, else model.safetensors."""
        model = self._model()
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        else:
            self.export_weights(self.named_weights(), folder)

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        model = self._model()
        write_weights(weights, folder)
        for name in ("config", "generation_config"):
            described: Any = getattr(model, name, None)
            if hasattr(described, "save_pretrained"):
                described.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    # ---- training state -------------------------------------------------------------------

    def training_tensors(self) -> Mapping[str, Tensor]:
        """What training needs beside weights, optimizer and schedule: the float32 masters.

        A subclass adds tensors of its own; they are saved, and filled in place when it is loaded.
        """
        return self.master_weights or {}

    def save_state(self, folder: Path) -> None:
        """Optimizer, schedule, training tensors and random states; weights are saved elsewhere."""
        save_training_state(
            folder,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            tensors=self.training_tensors(),
        )

    def load_state(self, folder: Path) -> None:
        """Also of a sharded module of the same model, whose optimizer is AdamW too.

        Raises ConfigError where the folder's state is not of this module's optimizer.
        """
        if PieceReader.is_at(folder):
            self._load_pieces(folder)
            return
        load_training_state(
            folder,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            tensors=self.training_tensors(),
        )

    def _load_pieces(self, folder: Path) -> None:
        masters = self.master_weights
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        load_pieces(
            folder,
            stepped=trained if masters is None else masters,
            split=self._parts,
            merge=self._merged,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            tensors={n: t for n, t in self.training_tensors().items() if n not in (masters or {})},
            are_masters=masters is not None,
        )

    # ---- steps ----------------------------------------------------------------------------

    def sum_gradients(self, scalars: Tensor) -> Tensor:
        """Collective: every rank, same order. Sums gradients in place, and `scalars` [n], which
        it returns. Losses must be each rank's share of the global loss, not means of shares.
        """
        if self.world_size == 1:
            return scalars
        # One call for all, in one dtype: a rank whose share was empty has no gradients at all.
        parameters = [p for p in self._model().parameters() if p.requires_grad]
        flat = torch.cat(
            [
                torch.zeros(p.numel(), device=p.device)
                if p.grad is None
                else p.grad.float().flatten()
                for p in parameters
            ]
            + [scalars.float()]
        )
        torch.distributed.all_reduce(flat)
        start = 0
        for p in parameters:
            p.grad = flat[start : start + p.numel()].view_as(p).to(p.dtype)
            start += p.numel()
        return flat[start:]

    def clip_gradients(self, loss: float, max_norm: float | None) -> float:
        """Clips to the global norm `max_norm` and returns the norm before.

        Raises NonFiniteError, gradients dropped and weights untouched, where the loss or the norm
        is not finite.
        """
        gradients = [p.grad for p in self._model().parameters() if p.grad is not None]
        # Norms of bfloat16 gradients are summed up in float32.
        norms = torch._foreach_norm(gradients, 2.0, torch.float32) if gradients else []
        norm = float(torch.linalg.vector_norm(torch.stack(list(norms)))) if norms else 0.0
        if not _finite(loss) or not _finite(norm):
            bad = [
                name
                for name, p in self._model().named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ]
            self._model().zero_grad()
            raise NonFiniteError(
                f"module {self.name!r} met a loss of {loss} and a gradient norm of {norm}"
                + (f" ({len(bad)} parameters, the first is {bad[0]})" if bad else "")
                + ": the weights were left as they are. Lower the learning rate, or look at the"
                " rewards and logprobs of this batch"
            )
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
        return norm

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """By one plain pass per sequence, without padding: the least that can go wrong."""
        found: list[list[float]] = []
        with self._evaluating() as model:
            for sequence in sequences:
                ids = torch.tensor([list(sequence)], device=self.context.device)  # [1, L]
                logits = model(input_ids=ids).logits[0, :-1].float()  # [L - 1, V]
                chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
                found.append(chosen[:, 0].tolist())
        return found

    def vocabulary_size(self) -> int:
        """Rows of the model's input embedding; 0 where it has none."""
        embeddings = getattr(self._model(), "get_input_embeddings", None)
        return 0 if embeddings is None else int(embeddings().weight.shape[0])

    # ---- inside ---------------------------------------------------------------------------

    def _model(self) -> Any:
        model = self.__dict__.get("model")
        if not isinstance(model, nn.Module):
            found = "nothing" if model is None else f"a {type(model).__name__}"
            raise ConfigError(
                f"module {self.name!r} has {found} as self.model, expected a torch.nn.Module:"
                f" set self.model in {type(self).__name__}.setup, and call setup() first"
            )
        return model

    @contextmanager
    def _evaluating(self) -> Iterator[Any]:
        model = self._model()
        trained = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            model.train(trained)


@dataclass(slots=True)
class _Target:
    """A tensor of the model, on its way to be filled."""

    name: str
    tensor: Tensor
    parts: tuple[str, ...]
    """Names of the weights that it is made of."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """Those that came."""


def kind_of(name: str, tensor: Tensor) -> TensorKind:
    """Of a weight."""
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def is_overridden(cls: type, method: str, *, beside: str) -> bool:
    """Whether a subclass of the class that defines `beside` for `cls` defines `method` anew."""
    order = cls.__mro__

    def definer(name: str) -> int:
        return next(i for i, c in enumerate(order) if name in vars(c))

    return definer(method) < definer(beside)


def _finite(x: float) -> bool:
    return x - x == 0.0
