"""Samples of an episode as one Arrow table: what was sampled, with what was computed of it.

The decision here: which files count is what `scan` says, so a generation with a tombstone is never
read; and each file is checked by the digest in it, so that damage nobody has noticed yet is an
error and no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from rlhf_flows.data.arrow import table_from_parquet
from rlhf_flows.errors import DataDamageError, DataError, ShardDamageError
from rlhf_flows.registry import nearest
from rlhf_flows.store import EpisodeState, ObjectStore

__all__ = ["chosen", "episode_table", "from_rows", "read_shard", "stacked"]


def episode_table(
    store: ObjectStore, state: EpisodeState, columns: Sequence[str] | None = None
) -> pa.Table:
    """The samples of an episode in the order of its plan, with a column `episode` in front.

    A sample that is not scored yet, or was left out of scoring, has nulls there. Where nothing is
    sampled (a run that starts from preferences), the rows are those of the scored shards.

    Raises ShardDamageError for a file that is not what was written.
    """
    parts = []
    for index in sorted({*state.rollout, *state.scoring}):
        tables = [
            read_shard(store, found[index], columns)
            for found in (state.rollout, state.scoring)
            if index in found
        ]
        parts.append(tables[0] if len(tables) == 1 else _joined(*tables))
    table = stacked(parts)
    return table.add_column(0, "episode", pa.array([state.episode] * table.num_rows, pa.int64()))


def read_shard(
    store: ObjectStore, key: str, columns: Sequence[str] | None = None
) -> pa.Table:  # `sample_id` is always among them
    """One shard. Raises ShardDamageError."""
    wanted = None if columns is None else [*columns, "sample_id"]
    try:
        return table_from_parquet(store.get(key), wanted)
    except DataDamageError as e:
        raise ShardDamageError(
            f"the shard {store.url}/{key} is damaged ({e}): start the run again, which makes such a"
            " shard anew, or restore the file from a copy",
            key=key,
        ) from e


def _joined(sampled: pa.Table, scored: pa.Table) -> pa.Table:
    row_of = {name: row for row, name in enumerate(scored["sample_id"].to_pylist())}
    rows = pa.array([row_of.get(name) for name in sampled["sample_id"].to_pylist()], pa.int64())
    for name in scored.column_names:
        if name not in sampled.column_names:
            sampled = sampled.append_column(name, scored[name].combine_chunks().take(rows))
    return sampled


def stacked(tables: Iterable[pa.Table]) -> pa.Table:
    """One below the other; a column that some lack is null there."""
    found = list(tables)
    return pa.concat_tables(found, promote_options="permissive") if found else pa.table({})


def chosen(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """These columns, in this order. Raises DataError with the nearest name."""
    for name in columns or ():
        if name not in table.column_names:
            raise DataError(
                f"there is no column {name!r} of samples{nearest(name, table.column_names)}: there"
                f" are {', '.join(table.column_names)}"
            )
    return table if columns is None else table.select(list(columns))


def from_rows(rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> pa.Table:
    """A table of dicts: the columns of `schema` first, then what any row has, as numbers."""
    more = dict.fromkeys(name for row in rows for name in row if name not in schema.names)
    fields = [*schema, *(pa.field(name, pa.float64()) for name in more)]
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields))
