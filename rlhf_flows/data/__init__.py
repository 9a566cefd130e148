"""Samples as data: batches, plans of episodes, streams of shards, Arrow and Parquet, prompts.

Names are loaded when they are first used: the flow process plans and streams without torch, and
a reader of Parquet does not pay for what it does not touch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_flows.data.arrow import (
        from_arrow,
        from_parquet,
        parquet_metadata,
        to_arrow,
        to_parquet,
    )
    from rlhf_flows.data.batch import (
        Batch,
        Samples,
        batch_size,
        collate,
        concat,
        select,
        to_samples,
    )
    from rlhf_flows.data.columns import COLUMNS, COLUMNS_VERSION, GENERATED_COLUMNS, Column
    from rlhf_flows.data.dataset_kinds import register_dataset
    from rlhf_flows.data.demonstrations import DemonstrationDataset
    from rlhf_flows.data.packing import cut_by_tokens, deal
    from rlhf_flows.data.plan import (
        EpisodePlan,
        GroupRef,
        PlannedShard,
        make_plan,
        permutation,
        sample_id,
        sample_seed,
        training_batches,
    )
    from rlhf_flows.data.preferences import PreferenceDataset, pair_rows
    from rlhf_flows.data.prompts import PromptDataset, prompt_text
    from rlhf_flows.data.quarantine import Blamed, Quarantine
    from rlhf_flows.data.relay import EpisodeRelayBuffer, RelaySampleManager, relayed
    from rlhf_flows.data.row_sequences import (
        JoinedRows,
        LazyRows,
        LoadedRows,
        check_ids,
        columns_of,
        open_here,
        where_of,
    )
    from rlhf_flows.data.row_types import uniform_rows
    from rlhf_flows.data.rows import check_prompt, load_rows, rows_digest
    from rlhf_flows.data.shards import align, keep_samples
    from rlhf_flows.data.stream import ShardHandle, StreamDataset

__all__ = [
    "COLUMNS",
    "COLUMNS_VERSION",
    "GENERATED_COLUMNS",
    "Batch",
    "Blamed",
    "Column",
    "DemonstrationDataset",
    "EpisodePlan",
    "EpisodeRelayBuffer",
    "GroupRef",
    "JoinedRows",
    "LazyRows",
    "LoadedRows",
    "PlannedShard",
    "PreferenceDataset",
    "PromptDataset",
    "Quarantine",
    "RelaySampleManager",
    "Samples",
    "ShardHandle",
    "StreamDataset",
    "align",
    "batch_size",
    "check_ids",
    "check_prompt",
    "collate",
    "columns_of",
    "concat",
    "cut_by_tokens",
    "deal",
    "from_arrow",
    "from_parquet",
    "keep_samples",
    "load_rows",
    "make_plan",
    "open_here",
    "pair_rows",
    "parquet_metadata",
    "permutation",
    "prompt_text",
    "register_dataset",
    "relayed",
    "rows_digest",
    "sample_id",
    "sample_seed",
    "select",
    "to_arrow",
    "to_parquet",
    "to_samples",
    "training_batches",
    "uniform_rows",
    "where_of",
]

_HOME = {
    "arrow": ["from_arrow", "from_parquet", "parquet_metadata", "to_arrow", "to_parquet"],
    "batch": ["Batch", "Samples", "batch_size", "collate", "concat", "select", "to_samples"],
    "columns": ["COLUMNS", "COLUMNS_VERSION", "GENERATED_COLUMNS", "Column"],
    "packing": ["cut_by_tokens", "deal"],
    "plan": [
        "EpisodePlan",
        "GroupRef",
        "PlannedShard",
        "make_plan",
        "permutation",
        "sample_id",
        "sample_seed",
        "training_batches",
    ],
    "preferences": ["PreferenceDataset", "pair_rows"],
    "prompts": ["PromptDataset", "prompt_text"],
    "dataset_kinds": ["register_dataset"],
    "demonstrations": ["DemonstrationDataset"],
    "row_sequences": [
        "JoinedRows",
        "LazyRows",
        "LoadedRows",
        "check_ids",
        "columns_of",
        "open_here",
        "where_of",
    ],
    "row_types": ["uniform_rows"],
    "rows": ["check_prompt", "load_rows", "rows_digest"],
    "relay": ["EpisodeRelayBuffer", "RelaySampleManager", "relayed"],
    "quarantine": ["Blamed", "Quarantine"],
    "shards": ["align", "keep_samples"],
    "stream": ["ShardHandle", "StreamDataset"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
