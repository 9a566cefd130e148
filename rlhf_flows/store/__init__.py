"""The store is the truth: immutable objects by put-if-absent, and what they mean for a run."""

from rlhf_flows.store.attempts import (
    Attempt,
    Outcome,
    attempt_that_may_live,
    check_fence,
    deaths_in_a_row,
    end_attempt,
    newest_attempt,
    take_attempt,
)
from rlhf_flows.store.checkpoints import FolderRecord, delete_folder, fetch_folder, upload_folder
from rlhf_flows.store.commit import Commit, commit_bytes, commit_json, read_json
from rlhf_flows.store.layout import KeyParts, RunLayout, ShardPhase, check_run_name, parse_key
from rlhf_flows.store.objects import FileRecord, ObjectInfo, ObjectStore
from rlhf_flows.store.open import open_store
from rlhf_flows.store.patience import Patience
from rlhf_flows.store.probe import probe_put_if_absent
from rlhf_flows.store.runs import RunRecord, config_digest, open_run
from rlhf_flows.store.scan import EpisodeState, EvaluationState, RunState, scan, scan_keys
from rlhf_flows.store.sweeping import LeftoverFolder, leftover_folders, sweep_folders, sweep_run

__all__ = [
    "Attempt",
    "Commit",
    "EpisodeState",
    "EvaluationState",
    "FileRecord",
    "FolderRecord",
    "KeyParts",
    "LeftoverFolder",
    "ObjectInfo",
    "ObjectStore",
    "Outcome",
    "Patience",
    "RunLayout",
    "RunRecord",
    "RunState",
    "ShardPhase",
    "attempt_that_may_live",
    "check_fence",
    "check_run_name",
    "commit_bytes",
    "commit_json",
    "config_digest",
    "deaths_in_a_row",
    "delete_folder",
    "end_attempt",
    "fetch_folder",
    "leftover_folders",
    "newest_attempt",
    "open_run",
    "open_store",
    "parse_key",
    "probe_put_if_absent",
    "read_json",
    "scan",
    "scan_keys",
    "sweep_folders",
    "sweep_run",
    "take_attempt",
    "upload_folder",
]
