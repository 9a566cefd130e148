"""What can be asked for: strict pydantic models, read alike from YAML, `key=value` and Python.

The decision here: a recipe's configuration is one frozen model, a subclass of `EngineConfig`, and
whatever can be checked without a cluster is checked here, before anything starts. How it is read is
the affair of config_loading.py. No torch, no Ray, no Prefect.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from rlhf_flows.runtime_settings import RuntimeConfig
from rlhf_flows.settings import Settings

__all__ = [
    "MAY_CHANGE",
    "ClusterConfig",
    "EngineConfig",
    "ModelConfig",
    "RuntimeConfig",
    "RuntimeEnvConfig",
    "StoreConfig",
    "default_threads",
]

MAY_CHANGE = frozenset(
    {
        "run_name",
        "versions",
        "imports",
        "store",
        "cluster",
        "log_level",
        "flows.evaluator",
        "runtime_env",
        # Where a service is and what a reward may cost, and what becomes of samples that it fails
        # for: a run that ended over one of these goes on with another.
        "reward.url",
        "reward.token_env",
        "reward.timeout_s",
        "reward.retries",
        "reward.request_size",
        "reward.max_concurrency",
        "reward.memory_mb",
        "reward.environment",
        "reward.on_failure",
        "reward.failure_reward",
        # A checkpoint is cut anew for whoever loads it.
        "trainer.tensor_parallel",
        "trainer.pipeline_parallel",
        "trainer.virtual_pipeline",
        "trainer.data_parallel",
        "trainer.sequence_parallel",
        "trainer.distributed_optimizer",
        "models.*.num_replica",
        "models.*.ranks_per_replica",
        "models.*.num_threads",
        "models.*.num_cpu",
        "models.*.cpu_per_process",
        "models.*.num_gpu",
        "models.*.gpu_per_process",
        "models.*.memory_bytes",
        "models.*.model_config_file",
        "runtime.colocation",
        "runtime.cpu_schedule_strategy",
        "runtime.eval_episode_interval",
        "runtime.eval_num_inference_per_prompt",
        "runtime.enable_eval_before_training",
        "runtime.num_episode",
        "runtime.shard_timeout_s",
        "runtime.setup_timeout_s",
        "runtime.sync_timeout_s",
        "runtime.train_timeout_s",
        "runtime.collective_timeout_s",
        "runtime.keep_last",
        "runtime.keep_every",
        "runtime.keep_best",
        "runtime.keep_best_metric",
        "runtime.keep_best_is",
        "runtime.max_attempts",
        "runtime.max_replica_restarts",
        "runtime.max_quarantined",
        "runtime.new_prompts",
        "runtime.stop_if",
    }
)
"""Fields that may differ when a run is resumed: none of them changes what is asked for, except what
becomes of samples that a reward fails for. Another number of ranks or threads of a trained module,
or another device, changes the order of sums, and so the last bits of its weights."""


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class StoreConfig(Settings):
    """Where everything durable goes."""

    form_first: ClassVar[tuple[str, ...]] = ("url",)

    url: str = Field(
        default="runs",
        title="Address of the store",
        description="A folder, `file://...` or `s3://bucket/prefix`.",
    )
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

    form_first: ClassVar[tuple[str, ...]] = ("address",)

    address: str | None = Field(
        default=None,
        title="Address of the Ray head",
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


class RuntimeEnvConfig(Settings):
    """What the workers' processes need beside what is installed (Ray's runtime environment)."""

    pip: list[str] | str | None = Field(
        default=None, description="Packages, or a requirements file, that workers install."
    )
    py_modules: list[str] = Field(
        default_factory=list, description="Folders of Python packages that are sent to workers."
    )
    working_dir: str | None = Field(
        default=None, description="A folder that is sent to workers, and that they run in."
    )
    excludes: list[str] = Field(
        default_factory=list, description="Files of working_dir and py_modules that stay here."
    )

    def for_ray(self) -> dict[str, Any]:
        """The fields that are set, by Ray's names."""
        return {name: value for name, value in self.model_dump().items() if value}


class BatchGenerationConfig(Settings):
    """Which prompts are sampled together."""

    ranking: bool = Field(
        default=False,
        description="Prompts of one length side by side: shards of about equal work. Which samples"
        " are trained together stays the same.",
    )


class ModelConfig(Settings):
    """How one module is placed."""

    num_replica: PositiveInt | None = Field(
        default=None,
        description="Copies of the module that share the shards; by default as many as num_gpu or"
        " num_cpu holds, 1 of a trained module.",
    )
    ranks_per_replica: PositiveInt | None = Field(
        default=None,
        description="Processes of one replica, in one torch process group; by default what the"
        " parallel sizes ask for, and of a trained module all that num_gpu holds.",
    )
    num_gpu: float = Field(default=0, ge=0, description="GPUs of the module, all its processes.")
    gpu_per_process: float | None = Field(
        default=None, gt=0, description="GPUs of one process, 1 by default; a share below 1."
    )
    num_cpu: float = Field(
        default=0,
        ge=0,
        description="CPUs reserved for the module, all its processes; 0 shares the machine's.",
    )
    cpu_per_process: float | None = Field(
        default=None, gt=0, description="CPUs of one process, 1 by default where num_cpu is given."
    )
    tensor_model_parallel_size: PositiveInt = Field(
        default=1, description="Processes that share each layer: a factor of ranks_per_replica."
    )
    pipeline_model_parallel_size: PositiveInt = Field(
        default=1, description="Processes that share the layers: a factor of ranks_per_replica."
    )
    expert_model_parallel_size: PositiveInt = Field(
        default=1, description="Processes that share the experts: a factor of ranks_per_replica."
    )
    memory_bytes: int = Field(
        default=0, ge=0, description="Memory reserved for one rank; 0 reserves none."
    )
    num_threads: PositiveInt | None = Field(
        default=None, description="CPU threads of one rank; by default what the module asks for."
    )
    generation_batch_size: int | None = Field(
        default=None,
        description="Rows of one call, where smaller than a shard; 0 or -1: the shard in one.",
    )
    sync_frequency: int | None = Field(
        default=None,
        ge=0,
        description="Sync parameters into this module every N episodes; 0 never. By default"
        " runtime.sync_frequency.",
    )
    trainable: bool | None = Field(
        default=None,
        description="Whether the trainer's flow trains it: known from the flow, checked if said.",
    )
    batch_generation: BatchGenerationConfig = Field(
        default_factory=BatchGenerationConfig, description="Which prompts are sampled together."
    )
    model_config_file: str | None = Field(
        default=None, description="A YAML file of arguments of the module's own, for args_dict."
    )
    args_dict: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the module's own, which it reads as self.model_args.",
    )

    @field_validator("generation_batch_size")
    @classmethod
    def _of_the_shard(cls, value: int | None) -> int | None:
        return value if value is None or value > 0 else None


class EngineConfig(Settings):
    """What every recipe has."""

    form_last: ClassVar[tuple[str, ...]] = (
        "models",
        "cluster",
        "store",
        "runtime_env",
        "imports",
        "log_level",
    )
    form_description: ClassVar[str] = (
        "Fill in what is not marked optional; everything else has a value that works. Left empty,"
        " a box takes what its description says. *Essentials* are what is usually changed, *All"
        " settings* shows the rest (choose it first: it starts from the defaults)."
    )

    @staticmethod
    def _shape(schema: dict[str, Any], model: type[BaseModel]) -> None:
        Settings._shape(schema, model)
        assert issubclass(model, EngineConfig)
        schema["description"] = model.form_description

    model_config = ConfigDict(json_schema_extra=_shape)

    run_name: str | None = Field(
        default=None,
        title="Name of the training run",
        description="Left empty, it is made from the flow run's. The name of a run that exists"
        " goes on with it. For schedules it may hold {date}, {time} and {id} of the flow run:"
        " nightly-{date}.",
    )
    init_from: str | None = Field(
        default=None,
        title="Parent run",
        description="RUN@VERSION of the same recipe and store: the trained modules begin with its"
        " weights; everything else begins anew.",
    )
    imports: tuple[str, ...] = Field(
        default=(),
        title="Modules to import first",
        description="Modules of yours that are imported first: what they register (datasets,"
        " interfaces, families) is then known by its name.",
    )
    store: StoreConfig = Field(
        default_factory=StoreConfig, description="Where everything that must last is written."
    )
    runtime_env: RuntimeEnvConfig = Field(
        default_factory=RuntimeEnvConfig,
        title="Packages for the workers",
        description="What the workers' processes need beside what is installed (Ray's runtime"
        " environment).",
    )
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig,
        title="Ray cluster",
        description="The machines that do the work; by default this one.",
    )
    runtime: RuntimeConfig = Field(
        default_factory=RuntimeConfig,
        title="Course of the run",
        description="How long the run is, and how many completions each step learns from.",
    )
    models: dict[str, ModelConfig] = Field(
        default_factory=dict,
        title="Placement of models",
        description='Placement of modules, by name, as JSON: `{"policy": {"num_gpu": 2}}`.'
        " By default all share one machine.",
    )
    log_level: str = Field(
        default="WARNING",
        title="Log level of the workers",
        description="How much the worker processes write to their logs.",
        json_schema_extra={"enum": list(_LEVELS)},
    )

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in _LEVELS:
            raise ValueError(f"log_level={value} is no level: use one of {', '.join(_LEVELS)}")
        return value.upper()

    def for_model(self, name: str) -> ModelConfig:
        return self.models.get(name, ModelConfig())


def default_threads() -> int:
    """CPU cores this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
