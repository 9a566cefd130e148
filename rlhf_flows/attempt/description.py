"""What an engine says of itself, and the same once it was found sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlhf_flows.attempt.shares import Share
from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.graph import Graph
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.tasks.backfill import Backfill
from rlhf_flows.tasks.progress import Progress
from rlhf_flows.tasks.runtime import DatasetInfo
from rlhf_flows.tasks.weights import SyncPair

__all__ = [
    "Checked",
    "Dataset",
    "Description",
    "Environment",
    "Evaluator",
    "Flow",
    "Part",
    "Trainer",
]

Flow = Callable[[Any], Any]


class Part:
    """A flow function, and the dataset that it starts from."""

    def __init__(self, flow: Flow) -> None:
        if not callable(flow):
            raise ConfigError(
                f"{type(self).__name__} was given a {type(flow).__name__}, expected a flow:"
                " a function of one batch that calls modules"
            )
        self.flow = flow
        self.datasets: list[Any] = []
        self.is_mixed = False
        """Whether it starts from several datasets, each with passes of its own."""

    def set_dataset(self, dataset: Any) -> Self:
        """Rows (a list), or a JSONL, JSON or Parquet file of them."""
        self.datasets, self.is_mixed = [dataset], False
        return self

    def set_multiple_datasets(self, datasets: Sequence[Any]) -> Self:
        """Several of them, mixed by `runtime.data_ratio`."""
        if isinstance(datasets, str) or not isinstance(datasets, Sequence) or not datasets:
            raise ConfigError(
                f"set_multiple_datasets was given {datasets!r:.60}, expected a list of datasets,"
                " each a list of rows or a file"
            )
        self.datasets, self.is_mixed = list(datasets), True
        return self


class Environment(Part):
    """Turns prompts into samples: rollout and scoring."""


class Trainer(Part):
    """Trains on samples: each module call is one optimizer step on a global batch."""


class Evaluator(Part):
    """Evaluates a policy version on a dataset of its own.

    What it finds may be looked at by `post_process`, of a subclass or set as a function: it is
    given `{module: [batches]}` of the modules whose outputs the flow returns, and information on
    the evaluation (`policy_version`, `run`); what it returns, numbers by name, joins the metrics.
    """

    post_process: Callable[[dict[str, list[Any]], dict[str, Any]], Any] | None = None

    def set_post_process_func(self, function: Callable[..., Any]) -> Self:
        if not callable(function):
            raise ConfigError(
                f"set_post_process_func was given a {type(function).__name__}, expected a function"
                " of the outputs and of information on the evaluation"
            )
        self.post_process = function
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """All that an engine says, as `checks` reads it."""

    name: str
    config: EngineConfig
    environment: Environment | None
    trainer: Trainer | None
    evaluator: Evaluator | None
    syncs: tuple[SyncPair, ...]
    takeover: bool
    progress: Progress | None
    relay: Callable[[Any], Any] | None = None
    """Makes an episode's training samples of several episodes' samples."""
    only_evaluates: bool = False
    backfill: Backfill | None = None
    """Versions of another run, that the evaluator is asked for in place of its models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows of a dataset, and which modules build them."""

    rows: Sequence[Any]
    info: DatasetInfo
    owners: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A description that was found sound."""

    description: Description
    environment: Graph | None
    trainer: Graph | None
    evaluator: Graph | None
    rollout: frozenset[int]
    scoring: frozenset[int]
    syncs: tuple[SyncPair, ...]
    modules: Mapping[str, BaseModule]
    shares: Mapping[str, Share]
    """What each module gets of the cluster."""
    opened: frozenset[str]
    """The modules that an attempt needs."""
    dataset: Dataset | None
    eval_dataset: Dataset | None

    @property
    def config(self) -> EngineConfig:
        return self.description.config
