"""The model of a run as a Hugging Face folder: where it lies, or a verified copy of it."""

from __future__ import annotations

from pathlib import Path

from rlhf_flows.errors import ConfigError
from rlhf_flows.records.finding import find_run, missing_version
from rlhf_flows.services.environment import cache_folder, is_server_configured
from rlhf_flows.store import (
    FolderRecord,
    ObjectStore,
    RunLayout,
    fetch_folder,
    open_store,
    read_json,
)
from rlhf_flows.store.patience import BRIEF_S

__all__ = ["export_model", "exported_model"]


def exported_model(
    url: str,
    run: str,
    *,
    version: int | None = None,
    module: str = "",
    retry_budget_s: float = BRIEF_S,
) -> Path:
    """A local folder with the weights of a policy version: in the store itself where it is local.

    Args:
        version: The newest by default.
        module: Which trained module, or which that follows the average of one; needed where the
            run trains several.
        retry_budget_s: How long an outage of the store is waited for.

    Raises:
        ConfigError: no such run, version or module, or its weights were deleted by retention.
    """
    store = open_store(url, retry_budget_s=retry_budget_s)
    record, _ = _weights(store, run, version, module)
    if store.url.startswith("file://"):
        return Path(store.url.removeprefix("file://")) / record.prefix
    local = cache_folder() / "weights" / record.prefix
    fetch_folder(store, record, local)
    return local


def export_model(
    url: str, run: str, folder: Path, *, version: int | None = None, module: str = ""
) -> Path:
    """Copies the weights of a policy version to `folder`, verified file by file.

    A Prefect server that is configured is told of it: the end of the run's lineage.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a new or an empty folder for the model")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} is not empty: name another one for the model")
    store = open_store(url)
    record, version = _weights(store, run, version, module)
    fetch_folder(store, record, folder)
    if is_server_configured():
        from rlhf_flows.reporting.assets import export_made

        export_made(store.url, run, version, folder)
    return folder


def _weights(
    store: ObjectStore, run: str, version: int | None, module: str
) -> tuple[FolderRecord, int]:
    """The record of the weights, and which version that is."""
    state = find_run(store, run)
    newest = state.trained_episodes
    version = newest if version is None else version
    if not 1 <= version <= newest:
        raise missing_version(run, version, newest)
    checkpoints = read_json(store, RunLayout(run).trained(version - 1))["checkpoints"]
    averages = [entry.get("averages", {}) for entry in checkpoints.values()]
    if not module and len(checkpoints) > 1:
        raise ConfigError(f"run {run!r} trains {', '.join(checkpoints)}: say which with --module")
    name = module or next(iter(checkpoints))
    found = {name: entry for some in (*averages, checkpoints) for name, entry in some.items()}
    if name not in found:
        raise ConfigError(f"run {run!r} trains no {name!r}, it trains {', '.join(checkpoints)}")
    record = FolderRecord.from_json(found[name]["weights"])
    if record.prefix in state.deleted:
        raise ConfigError(
            f"the weights of version {version} of run {run!r} were deleted by retention"
            " (runtime.keep_last): take a newer version"
        )
    return record, version
