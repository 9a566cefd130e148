"""The samples of an episode as one Parquet file outside the store."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from rlhf_flows.errors import ConfigError
from rlhf_flows.records.opened_run import open_run

__all__ = ["export_episode"]


def export_episode(url: str, run: str, folder: Path, *, episode: int) -> Path:
    """Writes `RUN-episode=NNNNNN.parquet` into `folder`: samples with what was computed of them,
    each shard verified by its digest, those with a tombstone left out. Whole, or not there.

    Raises:
        ConfigError: no such run or episode, or the file is there already.
        ShardDamageError: a shard is not what was written.
    """
    table = open_run(url, run).samples(episode)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder for the samples")
    file = folder / f"{run}-episode={episode:06d}.parquet"
    if file.exists():
        raise ConfigError(f"{file} is there already: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    try:
        pq.write_table(table, part, compression="zstd")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file
