"""What the flow and the workers say to each other: small frozen records, no data.

Batches travel beside them as Ray objects (Arrow tables), or are read from the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_flows.modules.base import ModuleContext
from rlhf_flows.store import FolderRecord

__all__ = [
    "RELAYED",
    "SOURCE",
    "CheckpointRecord",
    "ForwardCall",
    "NodeReport",
    "PoolSpec",
    "Probe",
    "RelayCall",
    "Source",
    "StoredShard",
    "TrainCall",
    "TrainRows",
    "WorkerState",
]


SOURCE = -1
"""Stands for the source among the inputs of a `ForwardCall`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """What a pool is made of. Its digest decides whether a living pool can be taken over."""

    run: str
    module: bytes
    """The module, by cloudpickle."""
    module_name: str
    store_url: str
    context: ModuleContext
    num_replica: int = 1
    ranks_per_replica: int = 1
    num_gpu: float = 0
    num_cpu: float = 0
    memory_bytes: int = 0
    is_spread: bool = False
    """Over the nodes of the cluster, where no GPU decides."""
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    """Of Ray, beside the variables that the pool sets."""
    num_threads: int = 1
    lease_s: float = 900.0
    store_retry_budget_s: float = 120.0
    collective_timeout_s: float = 300.0
    """How long a rank waits for the others of its replica."""
    averages: Mapping[str, float] = field(default_factory=dict)
    """Eta of the moving average of a trained module's weights, by the module that follows it."""
    relay: bytes | None = None
    """The relay function of a trained module, by cloudpickle."""
    works_beside: bool = False
    """Training goes on while a checkpoint is on its way: its actors answer beside their work."""
    log_level: str = "WARNING"
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """What a worker holds, as it says on `attach`."""

    pid: int
    host: str
    digest: str
    ready: bool
    """`setup` is done."""
    version: int
    """Policy version of the weights it holds."""
    clean: bool
    """Nothing was trained since that version was committed."""
    trained: int = -1
    """The version that the last training led to, until its commit is known; -1 for none."""
    datasets: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """(kind, digest) of each dataset it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of the dataset as the input of a node, with the columns of the plan."""

    dataset: str
    """`train` or `eval`."""
    columns: Mapping[str, list[Any]]
    """sample_id, group, sibling, prompt_row and seed of each sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """A table to be read from the store, where its Ray object is gone."""

    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCall:
    """One node of the graph on one shard."""

    attempt: int
    phase: str
    episode: int
    shard: int
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    """The node's inputs in order: an index into the tables that follow, or `SOURCE`."""
    source: Source | None = None
    keep_source: bool = False
    """Another node of the phase takes the source, too: it is returned."""
    merged: tuple[int, ...] = ()
    """Tables that are outputs of other nodes of the phase, stored with this one's."""
    base: int | None = None
    """The table that is the rollout shard: what it holds is not stored again."""
    samples: frozenset[str] | None = None
    """Ids of the rows of the tables that the call is on; all by default."""
    version: int | None = None
    """The policy version that must be in the weights, for a module that follows a trainer."""
    batch_size: int | None = None
    """Rows of one call of the module's method; all by default."""
    commit_key: str | None = None
    """Where the worker writes what it made; nowhere by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node did on a shard."""

    module: str
    shard: int
    rows: int
    seconds: float
    key: str = ""
    adopted: bool = False
    """Somebody else had committed this shard; theirs is what counts."""
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Of each number column, and of the lengths of ragged ones: its mean and its rows."""
    previews: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRows:
    """Some rows of one shard."""

    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCall:
    """One global batch of one trainable module: one optimizer step."""

    attempt: int
    episode: int
    version: int
    """The version that the weights must have at the start of the episode."""
    index: int
    """Of this optimizer step within the episode; 0 starts the episode."""
    iteration: int
    """Of this optimizer step within the run."""
    num_updates: int
    """Optimizer steps of this episode."""
    method: str
    rows: tuple[TrainRows, ...] = ()
    """This batch, in order; none where all its groups are left out: the step is then empty."""
    episode_rows: tuple[tuple[TrainRows, ...], ...] | None = None
    """Every batch of the episode, for a module that wants them before its first step."""
    shards: tuple[tuple[int, int], ...] = ()
    """(index, number of tables) of each shard whose tables follow, in order; those of one shard
    are merged, later ones winning. A worker keeps them for the episode."""
    left_out: frozenset[str] = frozenset()
    """Ids of samples of these shards that are not trained on; rows are counted without them."""
    sources: tuple[tuple[int, Source], ...] = ()
    """Instead of tables, where a flow has no environment: (shard, rows of the dataset)."""


RELAYED = -1
"""Stands for the relayed samples among the shards of a `TrainCall`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCall:
    """The samples of some episodes, for the relay function of a trained module."""

    attempt: int
    episode: int
    version: int
    episodes: tuple[tuple[int, tuple[int, ...]], ...]
    """(episode, number of tables of each of its shards): the tables follow, in order."""
    left_out: frozenset[str]
    """Ids of samples that are not shown."""
    expected: int | None
    """Samples that the function must return, where that is fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a trained module said to some token sequences: whoever takes its weights must agree."""

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    """Of each token after the first, at temperature 1."""
    dtype: str
    """Of the weights."""

    def to_json(self) -> dict[str, Any]:
        return {
            "sequences": [list(s) for s in self.sequences],
            "logprobs": [list(p) for p in self.logprobs],
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Probe:
        return cls(
            sequences=tuple(tuple(s) for s in data["sequences"]),
            logprobs=tuple(tuple(p) for p in data["logprobs"]),
            dtype=data["dtype"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """One module's part of a commit."""

    module: str
    digest: str
    """Of the weights: names, dtypes, shapes and bytes."""
    weights: FolderRecord | None
    state: FolderRecord | None
    probe: Probe | None
    seconds: float
    averages: Mapping[str, CheckpointRecord] = field(default_factory=dict)
    """Of the weights, by the module that follows each: weights without state or probe."""

    @property
    def weights_folders(self) -> list[FolderRecord]:
        """All that a follower may read, the averages' too."""
        records = (self, *self.averages.values())
        return [r.weights for r in records if r.weights is not None]

    @property
    def digests(self) -> dict[str, str]:
        """Of the weights (""), and of each average by its name."""
        return {"": self.digest, **{name: r.digest for name, r in self.averages.items()}}

    def to_json(self) -> dict[str, Any]:
        averages = {name: record.to_json() for name, record in self.averages.items()}
        return {
            "module": self.module,
            "digest": self.digest,
            "weights": None if self.weights is None else self.weights.to_json(),
            "state": None if self.state is None else self.state.to_json(),
            "probe": None if self.probe is None else self.probe.to_json(),
            "seconds": round(self.seconds, 4),
            **({"averages": averages} if averages else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CheckpointRecord:
        weights, state, probe = data["weights"], data["state"], data["probe"]
        return cls(
            module=data["module"],
            digest=data["digest"],
            weights=None if weights is None else FolderRecord.from_json(weights),
            state=None if state is None else FolderRecord.from_json(state),
            probe=None if probe is None else Probe.from_json(probe),
            seconds=data["seconds"],
            averages={
                name: cls.from_json(entry) for name, entry in data.get("averages", {}).items()
            },
        )
