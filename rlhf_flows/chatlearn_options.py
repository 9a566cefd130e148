"""Options of ChatLearn's configuration that have no meaning here: why, or what says the same.

Those that have one are fields of `rlhf_flows.config`, under ChatLearn's own names. The guide
(docs/from_chatlearn.md) has both lists.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ELSEWHERE", "RENAMED_SECTIONS"]

RENAMED_SECTIONS: Mapping[str, str] = {"rlhf": "runtime"}
"""Old names of sections, which are accepted."""

_SHARED_GPUS = (
    "models do not take turns on a GPU yet: give each its own (num_gpu), or a share of one"
    " (gpu_per_process below 1, or runtime.colocation)"
)
_TRANSPORT = "weights travel through Ray's object store, in buckets of runtime.sync_bucket_bytes"
_STORE = "everything of a run is kept under store.url, by its run_name"
_LORA = "low-rank adapters are not trained yet: all weights are"
_SHARDED = (
    "a trained module's ranks are data-parallel (ranks_per_replica), or share the model on Megatron"
    " (`trainer.backend`)"
)
_LOGS = "metrics are in the run's store, on its page in Prefect and in --json"

ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "runtime_env": {
        "platform": "where the flow runs is the affair of its Prefect work pool",
    },
    "models.*": {
        "num_device": "the old name of num_gpu: use that",
        "model_type": "the class says what a module is",
        "zero_size": _SHARDED,
        "fsdp_size": _SHARDED,
        "sp_size": _SHARDED,
        "offload_weights": _SHARED_GPUS,
        "offload_optimizer_states": _SHARED_GPUS,
        "free_grad_buffers": _SHARED_GPUS,
        "free_memory": _SHARED_GPUS,
        "force_free_memory": _SHARED_GPUS,
        "lora": _LORA,
        "enable_lora": _LORA,
        "n": "completions of one prompt are runtime.num_inference_per_prompt",
        "enable_stage_resume": "each shard is kept as soon as it exists, always",
        "apply_replica_id_to_seed": "each sample has a seed of its own, whichever replica takes it",
        "drop_last": "the samples of an episode are planned: none is dropped",
    },
    "runtime": {
        "max_iteration_per_sample": "tree search over one sample is a module's own affair",
        "data_rerank": "siblings stand side by side, always",
        "consumed_samples": "which rows were used is known from the store",
        "concurrent_setup": "all modules are set up at the same time, always",
        "data_checkpoint_path": _STORE,
        "max_data_ckpt_nums": "training states and weights kept are runtime.keep_last; samples are"
        " all kept",
        "load_data_checkpoint_iteration": "a run goes on where it is: start it again by run_name",
        "enable_resume_training": "a run_name that exists is resumed, another one is a new run",
        "save_interval": "use runtime.save_episode_interval",
        "param_sync_comm_type": _TRANSPORT,
        "param_sync_max_workers": _TRANSPORT,
        "concurrent_comm": _TRANSPORT,
        "coalesce_param": _TRANSPORT,
        "coalesced_buffer_mb": _TRANSPORT,
        "routed_expert_regrouping_comm_type": _TRANSPORT,
        "free_sync_collective_group": _TRANSPORT,
        "bucket_size_mb_in_memory_manager": _TRANSPORT,
        "validate_param_sync": "every sync is checked: by a digest of the bytes, and by"
        " runtime.sync_probe",
        "policy_to_regroup_queue": "outputs are joined by sample, however many replicas there are",
        "log_interval": _LOGS,
        "log_config_file": _LOGS,
        "exp_name": "the name of a run is run_name",
        "output_dir": _STORE,
        "debug": "log_level=DEBUG shows what workers do",
        "nsys": "profilers attach to a worker by its process id (`rlhf-flows pools ls`)",
        "profiler_dir": "profilers attach to a worker by its process id (`rlhf-flows pools ls`)",
        "free_memory": _SHARED_GPUS,
    },
}
"""Section -> option -> why it is refused."""
