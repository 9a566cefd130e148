"""What can be asked for: strict pydantic models, read alike from YAML, `key=value` and Python.

The decision here: a recipe's configuration is one frozen model, a subclass of `EngineConfig`. An
unknown key is refused with the nearest right one, and whatever can be checked without a cluster is
checked here, before anything starts. No torch, no Ray, no Prefect.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from rlhf_flows.errors import ConfigError
from rlhf_flows.settings import Settings

__all__ = [
    "MAY_CHANGE",
    "ClusterConfig",
    "EngineConfig",
    "ModelConfig",
    "RuntimeConfig",
    "StoreConfig",
    "default_threads",
    "load_config",
]

MAY_CHANGE = frozenset(
    {
        "run_name",
        "store",
        "cluster",
        "log_level",
        "models.*.num_replica",
        "models.*.ranks_per_replica",
        "models.*.num_threads",
        "models.*.num_cpu",
        "models.*.num_gpu",
        "models.*.memory_bytes",
        "runtime.num_episode",
        "runtime.shard_timeout_s",
        "runtime.setup_timeout_s",
        "runtime.sync_timeout_s",
        "runtime.train_timeout_s",
        "runtime.keep_last",
        "runtime.max_attempts",
        "runtime.max_replica_restarts",
        "runtime.max_quarantined",
        "runtime.new_prompts",
    }
)
"""Fields that may differ when a run is resumed: none of them changes what is asked for. Another
number of ranks or threads of a trained module, or another device, changes the order of sums, and so
the last bits of its weights."""


class StoreConfig(Settings):
    """Where everything durable goes."""

    url: str = Field(default="runs", description="A folder, `file://...` or `s3://bucket/prefix`.")
    single_writer: bool = Field(
        default=False,
        description="Accept a store that fails the put-if-absent probe. Safe only if no two"
        " processes ever work on one run.",
    )
    retry_budget_s: float = Field(
        default=120.0,
        ge=0,
        description="How long an outage of the store, a full disk too, is waited for before the"
        " run fails.",
    )


class ClusterConfig(Settings):
    """The Ray cluster that holds the actor pools."""

    address: str | None = Field(
        default=None,
        description="`host:port` of a running head (pools outlive the flow); none starts a local"
        " one that ends with the flow.",
    )
    num_cpus: PositiveInt | None = Field(
        default=None, description="CPUs that a local head offers; all of the machine by default."
    )
    object_store_memory_bytes: int = Field(
        default=1 << 30, ge=80 << 20, description="Shared memory of a local head's object store."
    )
    lease_s: float = Field(
        default=900.0,
        gt=0,
        description="Pools without a heartbeat for this long release themselves.",
    )
    keep_pools_on_cancel: bool = Field(
        default=False,
        description="Keep the pools of a cancelled run until their lease ends, as those of a"
        " suspended one; only with `address`.",
    )


class ModelConfig(Settings):
    """How one module is placed."""

    num_replica: PositiveInt = Field(
        default=1, description="Copies of the module that share the shards."
    )
    ranks_per_replica: PositiveInt = Field(
        default=1, description="Processes of one replica, in one torch process group."
    )
    num_gpu: float = Field(default=0, ge=0, description="GPUs of one rank.")
    num_cpu: float = Field(
        default=0, ge=0, description="CPUs reserved for one rank; 0 shares the machine's cores."
    )
    memory_bytes: int = Field(
        default=0, ge=0, description="Memory reserved for one rank; 0 reserves none."
    )
    num_threads: PositiveInt | None = Field(
        default=None, description="CPU threads of one rank; by default what the module asks for."
    )
    generation_batch_size: PositiveInt | None = Field(
        default=None, description="Rows of one call, where smaller than a shard."
    )


class RuntimeConfig(Settings):
    """The loop over episodes. Names and meanings are ChatLearn's where it has them."""

    num_episode: PositiveInt = Field(default=10, description="Episodes of the whole run.")
    sample_per_episode: PositiveInt = Field(default=512, description="Completions of one episode.")
    num_inference_per_prompt: PositiveInt = Field(
        default=1, description="Completions of one prompt: the group size."
    )
    generation_batch_size: PositiveInt | None = Field(
        default=None,
        description="Samples of one shard, whole groups; by default the episode in one.",
    )
    train_global_batch_size: PositiveInt | None = Field(
        default=None, description="Samples of one optimizer step; by default the whole episode."
    )
    num_training_epoch: PositiveInt = Field(
        default=1, description="Passes over an episode's samples."
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Versions a sampler may lag behind: 0 is on-policy, 1 overlaps.",
    )
    sync_frequency: PositiveInt = Field(default=1, description="Sync parameters every N episodes.")
    save_episode_interval: PositiveInt = Field(
        default=1, description="Full training state every N episodes; weights are kept for each."
    )
    keep_last: PositiveInt = Field(default=2, description="Training states and weights kept.")
    eval_episode_interval: int = Field(
        default=0, ge=0, description="Evaluate every N episodes; 0 never."
    )
    eval_num_inference_per_prompt: PositiveInt = Field(
        default=1, description="Completions of one prompt in an evaluation."
    )
    enable_eval_before_training: bool = Field(default=True, description="Evaluate version 0, too.")
    data_shuffle: bool = Field(default=True, description="Shuffle the prompts anew each epoch.")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of everything random in the run."
    )
    setup_timeout_s: float = Field(
        default=600.0, gt=0, description="For a module to load its model."
    )
    shard_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="For one module call on a shard. On top of this and of the next two comes what"
        " a worker may wait for a store that is away, store.retry_budget_s.",
    )
    train_timeout_s: float = Field(default=3600.0, gt=0, description="For one optimizer step.")
    sync_timeout_s: float = Field(
        default=600.0, gt=0, description="For the weights to reach a replica."
    )
    sync_bucket_bytes: PositiveInt = Field(
        default=128 << 20, description="Bytes of one sync bucket."
    )
    sync_probe: bool = Field(
        default=True, description="Compare logprobs of probe sequences between trainer and sampler."
    )
    max_attempts: PositiveInt = Field(
        default=5,
        description="Attempts in a row that may die (killed, crashed, machine lost) before the run"
        " stays failed.",
    )
    max_replica_restarts: int = Field(
        default=3,
        ge=0,
        description="Deaths of one replica before its pool fails, nothing finished in between.",
    )
    new_prompts: Literal["refuse", "take"] = Field(
        default="refuse",
        description="What becomes of a run that is resumed with other prompts than it was planned"
        " on: it is refused, or it takes them from the first episode on that is not trained.",
    )
    max_quarantined: int = Field(
        default=8,
        ge=0,
        description="Samples of one episode that may be left out, each with its group, because"
        " they end or hang their worker again and again; one more stops the run.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        group = self.num_inference_per_prompt
        for name in ("sample_per_episode", "generation_batch_size", "train_global_batch_size"):
            value = getattr(self, name)
            if value is not None and value % group:
                raise ValueError(
                    f"runtime.{name}={value} is not a multiple of runtime.num_inference_per_prompt"
                    f"={group}: samples of one prompt stay together, so take"
                    f" {max(1, value // group) * group}"
                )
        batch = self.train_global_batch_size
        if batch is not None and batch > self.sample_per_episode:
            raise ValueError(
                f"runtime.train_global_batch_size={batch} is more than"
                f" runtime.sample_per_episode={self.sample_per_episode}: lower the first"
            )
        if batch is not None and self.sample_per_episode % batch:
            raise ValueError(
                f"runtime.sample_per_episode={self.sample_per_episode} is not a multiple of"
                f" runtime.train_global_batch_size={batch}: an optimizer step would be short"
            )
        return self

    @property
    def samples_per_batch(self) -> int:
        return self.train_global_batch_size or self.sample_per_episode

    @property
    def samples_per_shard(self) -> int:
        return min(self.generation_batch_size or self.sample_per_episode, self.sample_per_episode)


class EngineConfig(Settings):
    """What every recipe has."""

    run_name: str | None = Field(
        default=None,
        description="Name of the run; an existing one is resumed. None makes a new one.",
    )
    store: StoreConfig = Field(default_factory=StoreConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    models: dict[str, ModelConfig] = Field(
        default_factory=dict, description="Placement of modules, by name."
    )
    log_level: str = Field(default="WARNING", description="Of the workers.")

    def for_model(self, name: str) -> ModelConfig:
        return self.models.get(name, ModelConfig())


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(
    model: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Builds a configuration from defaults, a YAML file and `key=value` words; later ones win.

    Args:
        overrides: Words such as `runtime.num_episode=3`; values are read as YAML.
        file: A YAML file, a mapping of the same fields.
        defaults: Values under both, in the same nested form.

    Raises:
        ConfigError: an unknown key (with the nearest right one), a wrong value, a wrong file.
    """
    data: dict[str, Any] = json.loads(json.dumps(defaults or {}))
    if file is not None:
        _merge(data, _read_yaml(Path(file)))
    for word in overrides:
        key, sep, text = word.partition("=")
        if not sep or not key:
            raise ConfigError(f"{word!r} is no setting: write it as key=value, as in seed=1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"the value of {key!r} is not readable: {text!r} ({e})") from e
        _put(data, key.split("."), value, key)
    _refuse_unknown(model, data, path=())
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e)) from e


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"the configuration file {path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"the configuration file {path} is not readable as YAML: {e}") from e
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the configuration file {path} holds a {type(loaded).__name__}, expected a mapping"
            " of fields"
        )
    return loaded


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _put(data: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{key!r} asks for a field inside {part!r}, which is a value")
    if isinstance(value, Mapping) and isinstance(data.get(path[-1]), dict):
        _merge(data[path[-1]], value)
    else:
        data[path[-1]] = value


def _refuse_unknown(model: type[BaseModel], data: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for key, value in data.items():
        dotted = ".".join((*path, str(key)))
        field = model.model_fields.get(str(key))
        if field is None:
            raise ConfigError(
                f"unknown setting {dotted!r}{_nearest(dotted, _all_keys(model, path))}"
            )
        inner = _model_in(field.annotation)
        if inner is None or not isinstance(value, Mapping):
            continue
        if _is_mapping(field.annotation):
            for name, entry in value.items():
                if isinstance(entry, Mapping):
                    _refuse_unknown(inner, entry, (*path, str(key), str(name)))
        else:
            _refuse_unknown(inner, value, (*path, str(key)))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _all_keys(model: type[BaseModel], path: tuple[str, ...]) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield ".".join((*path, name))
        inner = _model_in(field.annotation)
        if inner is not None and not _is_mapping(field.annotation):
            yield from _all_keys(inner, (*path, name))


def _nearest(key: str, known: Iterable[str]) -> str:
    keys = list(known)
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        leaves = {k.rpartition(".")[2]: k for k in reversed(keys)}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known here are {', '.join(sorted(k for k in keys if '.' not in k) or sorted(keys))}"


def _explain(error: ValidationError) -> str:
    parts = []
    for e in error.errors(include_url=False):
        where = ".".join(str(p) for p in e["loc"])
        text = e["msg"].removeprefix("Value error, ")
        if e["type"] == "missing":
            parts.append(f"setting {where!r} is missing: give it as {where}=...")
        elif e["type"] == "value_error" or not where:
            parts.append(text)
        else:
            found = repr(e.get("input"))
            parts.append(f"setting {where!r}: {text[0].lower() + text[1:]}, found {found[:80]}")
    return "; ".join(parts)


def default_threads() -> int:
    """CPU cores this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
