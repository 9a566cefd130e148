"""What an engine says of itself, and the same once it was found sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlhf_flows.config import EngineConfig
from rlhf_flows.errors import ConfigError
from rlhf_flows.graph import Graph
from rlhf_flows.modules.base import BaseModule
from rlhf_flows.tasks.progress import Progress
from rlhf_flows.tasks.runtime import DatasetInfo, SyncPair

__all__ = ["Checked", "Dataset", "Description", "Environment", "Evaluator", "Flow", "Trainer"]

Flow = Callable[[Any], Any]


class _Part:
    """A flow function, and the dataset that it starts from."""

    def __init__(self, flow: Flow) -> None:
        if not callable(flow):
            raise ConfigError(
                f"{type(self).__name__} was given a {type(flow).__name__}, expected a flow:"
                " a function of one batch that calls modules"
            )
        self.flow = flow
        self.dataset: Any = None

    def set_dataset(self, dataset: Any) -> Self:
        """Rows (a list), or a JSONL, JSON or Parquet file of them."""
        self.dataset = dataset
        return self


class Environment(_Part):
    """Turns prompts into samples: rollout and scoring."""


class Trainer(_Part):
    """Trains on samples: each module call is one optimizer step on a global batch."""


class Evaluator(_Part):
    """Evaluates a policy version on a dataset of its own."""


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
    dataset: Dataset | None
    eval_dataset: Dataset | None

    @property
    def config(self) -> EngineConfig:
        return self.description.config
