"""`MakesDataset`: what the ready-made modules share that make the dataset of their flow.

The decision here: a name is resolved where the program runs, when the module is made. What travels
to workers is the class, so that nothing needs to be registered there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from rlhf_flows.data.dataset_kinds import check_dataset, find_dataset, make_dataset
from rlhf_flows.data.row_sequences import indices_to_check, where_of
from rlhf_flows.errors import DataError, RlhfFlowsError
from rlhf_flows.models.causal_lm import load_tokenizer
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.registry import nearest

__all__ = ["DatasetType", "MakesDataset"]

DatasetType = str | type | None
"""A name that is registered, `package.module:Class`, a class, or the module's own kind."""
_Chosen = tuple[type, Mapping[str, Any]]
"""A class and its arguments."""


class MakesDataset(BaseModule):
    """Base of a module that may come first in its flow."""

    dataset_kind: ClassVar[str]
    """The kind that it makes where it is not told otherwise."""
    token_columns: ClassVar[tuple[str, ...]]
    """The columns of token ids that it reads of an item."""
    written_columns: ClassVar[frozenset[str]] = frozenset()
    """The columns that the run writes: an item may not have them."""
    path: Any
    tokenizer: Any

    _datasets: tuple[_Chosen, _Chosen] | None = None
    """For training and for evaluations."""

    def choose_dataset(
        self,
        dataset: DatasetType,
        args: Mapping[str, Any] | None,
        *,
        eval_dataset: DatasetType = None,
        eval_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Called by the constructor. Raises ConfigError for a class that cannot be made."""
        chosen = _chosen(self.dataset_kind if dataset is None else dataset, args)
        held_out = chosen
        if eval_dataset is not None or eval_args:
            held_out = _chosen(chosen[0] if eval_dataset is None else eval_dataset, eval_args)
        self._datasets = (chosen, held_out)

    # ---- what a subclass says -----------------------------------------------------------------

    def max_tokens_of_item(self, is_eval: bool) -> int:
        """Most tokens of an item, by the model and the settings."""
        raise NotImplementedError

    def dataset_defaults(self) -> dict[str, Any]:
        """Arguments of the ready-made kinds, by name."""
        return {}

    # ---- what the engine asks -----------------------------------------------------------------

    def row_fields(self, is_eval: bool = False) -> tuple[str, ...]:
        cls, _ = self._chosen(is_eval)
        return ("prompt",) if cls.__module__.startswith("rlhf_flows.") else ()

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Any:
        """A dataset of the chosen kind; its items hold `token_columns`."""
        cls, args = self._chosen(is_eval)
        return make_dataset(
            cls,
            prompts,
            # Not kept: in the user's program, where rows are checked, it would travel with the
            # module to its workers.
            self.tokenizer or load_tokenizer(self.path),
            max_tokens=self.max_tokens_of_item(is_eval),
            args=args,
            defaults=self.dataset_defaults(),
        )

    def validate_rows(self, rows: Sequence[Any], *, is_eval: bool = False) -> None:
        """Tokenizes the rows (of a large file, some of them), so that a bad one is found at the
        start. Raises DataError.
        """
        dataset = self.build_dataset(rows, is_eval)
        if type(dataset).__module__.startswith("rlhf_flows."):
            dataset.check()
            self._check_item(dataset[0], dataset, 0, is_eval)
            return
        for index in indices_to_check(rows, len(dataset)):
            try:
                item = dataset[index]
            except RlhfFlowsError:
                raise
            except Exception as e:  # a user's dataset may raise anything
                row = where_of(rows, index) if len(dataset) == len(rows) else "its row"
                raise DataError(
                    f"item {index} of {type(dataset).__name__} cannot be made ({type(e).__name__}:"
                    f" {e}): look at what its __getitem__ expects of {row}"
                ) from e
            self._check_item(item, dataset, index, is_eval)

    def _check_item(self, item: Any, dataset: Any, index: int, is_eval: bool) -> None:
        what = f"item {index} of {type(dataset).__name__}"
        if not isinstance(item, Mapping):
            raise DataError(
                f"{what} is a {type(item).__name__}, expected a dict of columns with"
                f" {', '.join(self.token_columns)}"
            )
        if taken := sorted(self.written_columns & set(item)):
            raise DataError(
                f"{what} has a column {taken[0]!r}, which the run itself writes: leave it out, or"
                " give it another name (docs/columns.md lists those in use)"
            )
        for name in self.token_columns:
            if name not in item:
                raise DataError(
                    f"{what} has no {name!r}{nearest(name, [str(n) for n in item])}: module"
                    f" {self.name!r} needs {', '.join(self.token_columns)}, and the item has"
                    f" {', '.join(map(repr, item))}"
                )
            ids = item[name]
            if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point():
                raise DataError(
                    f"{what} has {_kind(ids)} under {name!r}: give a 1-D tensor of token ids,"
                    " torch.tensor(tokenizer(text)['input_ids'])"
                )
            if not len(ids):
                raise DataError(f"{what} has no tokens under {name!r}: leave its row out")
        prompt, *others = (len(item[name]) for name in self.token_columns)
        total, limit = prompt + max(others, default=0), self.max_tokens_of_item(is_eval)
        if total > limit:
            raise DataError(
                f"{what} has {total} tokens, the limit is {limit}: cut it to max_tokens, which the"
                " dataset is given"
            )

    def _chosen(self, is_eval: bool) -> _Chosen:
        if self._datasets is None:  # a subclass's __init__ need not call ours
            self._datasets = (_chosen(self.dataset_kind, None),) * 2
        return self._datasets[is_eval]


def _chosen(dataset: str | type, args: Mapping[str, Any] | None) -> _Chosen:
    cls = find_dataset(dataset)
    check_dataset(cls, args or {})
    return cls, dict(args or {})


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"
