"""`BaseModule`: what a user writes for one model, and what a worker calls on it.

A module object lives twice. In the user's program it is a name and constructor arguments; calling
its methods inside a flow records a graph. In a worker it is set up once (`setup`) and lives across
episodes, retries and flow runs. It knows nothing of Ray, Prefect or Parquet, so it can be run and
tested in one process: `attach(ModuleContext(...))`, `setup()`, then its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_flows.errors import ConfigError
from rlhf_flows.graph import is_tracing, record
from rlhf_flows.modules.args import Args
from rlhf_flows.modules.fingerprint import fingerprint
from rlhf_flows.modules.timers import Timers

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_flows.data.batch import Batch

__all__ = ["BaseModule", "ModuleContext", "TakeWeights", "TensorKind"]

TensorKind = tuple[str, str, tuple[int, ...]]
"""Name, dtype as torch calls it (`bfloat16`) and shape of a weight."""
TakeWeights = Callable[["Sequence[tuple[str, Tensor]]"], None]
"""Takes some of the weights. They are its to read, not to keep: what outlives the call, it copies.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleContext:
    """Where a module runs: handed to it by its worker before `setup`."""

    seed: int = 0
    """Seed of the run; a worker seeds torch, numpy and random from it, the module and the rank."""
    rank: int = 0
    world_size: int = 1
    replica: int = 0
    num_replica: int = 1
    num_threads: int = 1
    """CPU threads this worker may use."""
    device: str = "cpu"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """The module's own arguments: `args_dict` of its section, over its `model_config_file`."""
    module_args: Mapping[str, Any] = field(default_factory=dict)
    """The rest of its section: how it is placed."""
    runtime_args: Mapping[str, Any] = field(default_factory=dict)
    """The runtime section of the configuration."""
    resumes: bool = False
    """Whether the run had trained something when this attempt began."""


class BaseModule:
    """One model, or anything else that a flow calls: a reward function, a judge, a tool.

    Override what the role needs: `setup` always; `forward_step` to turn batches into batches;
    `train_step` to learn; `build_dataset` where the module comes first in its flow.
    A batch is a dict of columns of one length (`rlhf_flows.data.batch`); one row is one sample.
    """

    generates: ClassVar[bool] = False
    """Whether calls of this module sample from a model: such calls are the rollout phase."""

    default_threads: ClassVar[int | None] = None
    """CPU threads of a worker that is not told otherwise; None takes all cores."""

    is_sharded: bool = False
    """Whether the ranks of a replica hold different parts of the model: `named_weights` is then
    collective, every rank iterates it to its end, and one such iteration at a time; `save_state`
    writes files of every rank's own. Otherwise each rank has all of it, and rank 0 alone writes.
    """

    _name: str
    _context: ModuleContext
    _timers: Timers

    def __new__(cls, *args: Any, **kwargs: Any) -> BaseModule:
        # The name is taken here, so that a subclass whose __init__ calls no super() still has one.
        self = super().__new__(cls)
        name = kwargs.get("name", args[0] if args else None)
        self.__dict__["_name"] = name if isinstance(name, str) else cls.__name__
        self.__dict__["_context"] = ModuleContext()
        self.__dict__["_timers"] = Timers()
        return self

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            self._name = name

    def __getattribute__(self, attribute: str) -> Any:
        value = object.__getattribute__(self, attribute)
        if attribute.startswith("_") or not is_tracing() or not callable(value):
            return value
        return partial(_call_or_record, self, attribute, value)

    # ---- identity -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The module's name: its identity in the configuration, the pools and the store."""
        return self._name

    @property
    def context(self) -> ModuleContext:
        return self._context

    @property
    def rank(self) -> int:
        return self._context.rank

    @property
    def world_size(self) -> int:
        return self._context.world_size

    @property
    def is_last_rank(self) -> bool:
        return self._context.rank == self._context.world_size - 1

    @property
    def num_replica(self) -> int:
        return self._context.num_replica

    @property
    def replica_id(self) -> int:
        """Which of the module's replicas this is, from 0."""
        return self._context.replica

    @property
    def data_parallel_rank(self) -> int:
        """Of a trained module, whose ranks share a global batch; 0 where they do not."""
        return self._context.rank

    @property
    def data_parallel_size(self) -> int:
        return self._context.world_size

    @property
    def resume_training(self) -> bool:
        """Whether the run goes on from an earlier attempt's training."""
        return self._context.resumes

    @property
    def model_args(self) -> Args:
        """The module's own arguments: `models.<name>.args_dict` and `model_config_file`."""
        return Args(self._context.model_args, f"models.{self._name}.args_dict")

    @property
    def module_args(self) -> Args:
        """How the module is placed: its section of the configuration."""
        return Args(self._context.module_args, f"models.{self._name}")

    @property
    def runtime_args(self) -> Args:
        """The runtime section of the configuration."""
        return Args(self._context.runtime_args, "runtime")

    @property
    def timers(self) -> Timers:
        """Stopwatches: `self.timers("forward").start()`; the metrics of a step show what they
        measured in it, as `forward_seconds`.
        """
        return self._timers

    def attach(self, context: ModuleContext) -> None:
        """Called by the worker before `setup`."""
        self._context = context

    # ---- life -----------------------------------------------------------------------------

    def parallel_sizes(self) -> Mapping[str, int]:
        """How the ranks of a replica share the model, where that is the module's to say:
        `tensor_model_parallel_size`, `pipeline_model_parallel_size` and `data_parallel_size`.
        What is left out the configuration says (`models.<name>`).
        """
        return {}

    def validate(self) -> None:
        """Checks, in the user's program, that this module can run; raises before any actor starts.

        Cheap: paths, names, numbers. No model is loaded here.
        """

    def validate_rows(self, rows: Sequence[Any], *, is_eval: bool = False) -> None:
        """Checks, in the user's program, the rows that `build_dataset` will be given.

        Asked of the first module of a flow, before any actor starts. Raises DataError.
        """

    def row_fields(self, is_eval: bool = False) -> tuple[str, ...]:
        """What every row of a file must have, of which `build_dataset` is to make a dataset."""
        return ("prompt",)

    def fingerprint(self) -> bytes:
        """Bytes that differ where code or arguments of the module do: a living worker whose
        module has another fingerprint is rebuilt, so that a mended function takes effect.
        """
        return fingerprint(self)

    def setup(self) -> None:
        """Loads the model, once, in the worker."""

    # ChatLearn's own take no argument; a subclass may leave it out.

    def before_episode(self, episode: int) -> None:
        """Called in each worker before its first work on an episode; again if it starts anew."""

    def after_episode(self, episode: int) -> None:
        """Called on a trained module after its last step of an episode, before the commit."""

    def save_checkpoint(self, iteration: int) -> None:
        """Called on a trained module whenever its training state is saved, with the policy version.

        For files of one's own: what the run needs it keeps by `save_state` and `save_pretrained`.
        A version that is not committed in the end was seen here, too.
        """

    # ---- work -----------------------------------------------------------------------------

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Any:
        """A `torch.utils.data.Dataset` of the rows that `set_dataset` was given.

        Asked of the first module of a flow. An item is a dict; `collate_fn` of the dataset, where
        it has one, makes a batch of a list of items.
        """
        raise ConfigError(
            f"module {self.name!r} comes first in its flow but has no build_dataset: define"
            f" {type(self).__name__}.build_dataset(prompts, is_eval) to return a Dataset"
        )

    def build_all_dataset(self, prompts: Sequence[Sequence[Any]], is_eval: bool = False) -> Any:
        """A list of datasets, one for each that `set_multiple_datasets` was given."""
        return [self.build_dataset(rows, is_eval=is_eval) for rows in prompts]

    def forward_step(self, data: Batch, iteration: int = 0) -> Batch:
        """One batch in, one batch out, row by row."""
        raise ConfigError(
            f"module {self.name!r} is called in a flow but {type(self).__name__} defines no"
            " forward_step(data, iteration)"
        )

    def eval_step(self, data: Batch) -> Batch:
        """What evaluation calls; `forward_step` where not overridden."""
        return self.forward_step(data)

    def step_by_keys(
        self,
        data: Batch,
        *,
        step: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        known_as: Mapping[str, str],
        gives: Mapping[str, str],
    ) -> Batch:
        """`step` on some columns alone: what a graph of calls asks for (`rlhf_flows.calls`)."""
        from rlhf_flows.modules.keyed_step import call_by_keys  # torch

        return call_by_keys(
            getattr(self, step),
            self.name,
            data,
            inputs=inputs,
            outputs=outputs,
            known_as=known_as,
            gives=gives,
        )

    def prepare_batch(self, data: Batch) -> Batch:
        """Called once per global batch, with whole groups, before it is cut into micro-batches.

        The place for what needs to see siblings together (group advantages) or the whole batch
        (normalization). May add columns; must keep the rows and their order.
        """
        return data

    def wants_episode(self, num_updates: int) -> bool:
        """Whether training must see all of an episode's batches before its first step."""
        return False

    def before_updates(self, batches: list[Batch]) -> list[Batch]:
        """All prepared batches of an episode, before its first step, where it `wants_episode`.

        The place for log-probabilities under the policy at the start of training. May add
        columns; must keep the batches, their rows and their order.
        """
        return batches

    def micro_batches(self, data: Batch) -> list[Batch]:
        """Cuts a prepared global batch into what one forward and backward pass takes, and takes
        this rank's share: by `runtime.train_micro_batch_size` rows or
        `runtime.train_micro_batch_tokens`; without either, every rank gets all of it in one.
        """
        from rlhf_flows.modules.micro_batches import cut_batch  # torch

        return cut_batch(
            data,
            settings=self.runtime_args,
            rank=self.data_parallel_rank,
            world_size=self.data_parallel_size,
        )

    def train_step(self, data: list[Batch], iteration: int) -> Mapping[str, float] | None:
        """One global batch, as a list of micro-batches: one optimizer step. Returns metrics."""
        raise ConfigError(
            f"module {self.name!r} is trained in a flow but {type(self).__name__} defines no"
            " train_step(data, iteration)"
        )

    # ---- weights and state ----------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under their Hugging Face names, in a fixed order; what a sync sends."""
        raise ConfigError(f"module {self.name!r} ({type(self).__name__}) has no weights to export")

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """`named_weights` in the precision that they are trained in; what averages are made of."""
        return self.named_weights()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes weights under their Hugging Face names; all of them, or raises."""
        raise ConfigError(f"module {self.name!r} ({type(self).__name__}) cannot load weights")

    def receiving_weights(self, kinds: Sequence[TensorKind]) -> AbstractContextManager[TakeWeights]:
        """Takes weights bit by bit: what comes within it adds up to `kinds`, in any order.

        On leaving it they are in place. Where it is left by an error, the module is in no known
        state, and is used no more. By default everything is kept until then, a copy of all weights,
        and given to `load_weights`: whoever defines that need not define this.

        Raises:
            SyncError: these are not this module's weights; nothing was changed.
        """
        return self._collecting()

    @contextmanager
    def _collecting(self) -> Iterator[TakeWeights]:
        kept: list[tuple[str, Tensor]] = []
        yield lambda weights: kept.extend((name, tensor.clone()) for name, tensor in weights)
        self.load_weights(kept)

    def save_state(self, folder: Path) -> None:
        """Writes what training needs beside the weights: optimizer, schedule, random states.

        Of a sharded module: collective, each rank into a folder of its own, files of names that no
        other rank writes. A rank that cannot write takes part to the end, and raises then.
        """

    def load_state(self, folder: Path) -> None:
        """Takes back what `save_state` wrote; the weights were loaded before."""

    def state_files(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        """Of the files that all ranks of a sharded module wrote, those that this rank is to read.
        Asked before `load_state`; `folder` holds those that are JSON.
        """
        return names

    def save_pretrained(self, folder: Path) -> None:
        """Writes the weights as a Hugging Face folder that any reader loads."""
        raise ConfigError(f"module {self.name!r} ({type(self).__name__}) has no weights to save")

    def export_weights(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        """`save_pretrained` of weights that come one by one, such as its own `named_weights`: a
        Hugging Face folder with the configuration and the tokenizer of this module.

        Asked of rank 0 of a sharded module.
        """
        raise ConfigError(
            f"module {self.name!r} ({type(self).__name__}) cannot export weights that come one by"
            " one: define export_weights(weights, folder), as every sharded module must"
        )

    def vocabulary_size(self) -> int:
        """Tokens that a probe may use; 0 where a sync of this module cannot be probed."""
        return 0

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities [len - 1] of each sequence's tokens after its first, at temperature 1.

        A param sync compares them between trainer and sampler.
        """
        raise ConfigError(f"module {self.name!r} ({type(self).__name__}) computes no logprobs")


def _call_or_record(
    module: BaseModule, attribute: str, method: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    symbol = record(module, attribute, args, kwargs)
    return method(*args, **kwargs) if symbol is None else symbol
