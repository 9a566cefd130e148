"""A run, opened for reading: Arrow tables over committed files, and SQL over these.

The decision here: nothing is kept. Each call lists the store anew, so that a run that somebody
trains meanwhile shows what is committed by then, and a table that was read stays as it was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rlhf_flows.errors import ConfigError
from rlhf_flows.records.finding import find_run, open_existing_store, shown_numbers
from rlhf_flows.records.sample_tables import chosen, episode_table, from_rows, stacked
from rlhf_flows.store import RunLayout, RunState, read_json

if TYPE_CHECKING:
    from rlhf_flows.records.audit import Audit

__all__ = ["OpenedRun", "open_run"]

_EPISODES = pa.schema(
    [
        *((name, pa.int64()) for name in ("episode", "version", "attempt")),
        *((name, pa.int64()) for name in ("planned", "trained", "filtered", "quarantined")),
        ("seconds", pa.float64()),
    ]
)
_EVALUATIONS = pa.schema(
    [("version", pa.int64()), ("evaluation", pa.string()), ("rows", pa.int64()),
     ("quarantined", pa.int64()), ("seconds", pa.float64())]
)  # fmt: skip


def open_run(url: str | Path, run: str | None = None) -> OpenedRun:
    """Opens a run for reading.

    Args:
        url: Of the store; or of the run itself, as `RunResult.url` has it, where `run` is not
            given.

    Raises:
        ConfigError: no such store or run (with the nearest name).
        StoreError: the store does not answer.
    """
    if run is None:
        above, _, run = str(url).rstrip("/").rpartition("/")
        url = above or "."
    return OpenedRun(url, run)


class OpenedRun:
    """What a run has committed; see `open_run`."""

    def __init__(self, url: str | Path, run: str) -> None:
        self.store = open_existing_store(url)
        find_run(self.store, run)
        self.name = run
        self._layout = RunLayout(run)
        self._record = read_json(self.store, self._layout.run_json)

    def __repr__(self) -> str:
        return f"OpenedRun({self.store.url!r}, {self.name!r})"

    @property
    def state(self) -> RunState:
        """What exists of the run now: one listing."""
        return find_run(self.store, self.name)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as first asked, with `recipe` and `flows`."""
        return dict(self._record["config"])

    @property
    def created_at(self) -> str:
        """UTC, ISO 8601."""
        return str(self._record["created_at"])

    @property
    def parent(self) -> dict[str, Any] | None:
        """`run`, `version`, `store` and `digests` of the weights that this run began from
        (`init_from`); None where it began from its configuration's models.
        """
        parent: dict[str, Any] | None = self._record["config"].get("parent")
        return parent

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Of each attempt what it said when it began, and `outcome` and `ended_at`; None where it
        has not ended, or died.
        """
        found = []
        ended = {i.key for i in self.store.list(self._layout.attempts_prefix)}
        for number in self.state.attempts:
            record = read_json(self.store, self._layout.attempt(number))
            end_key = self._layout.attempt_ended(number)
            end = read_json(self.store, end_key) if end_key in ended else {}
            outcome = {name: end.get(name) for name in ("outcome", "ended_at")}
            found.append({k: v for k, v in record.items() if k != "nonce"} | outcome)
        return found

    def episodes(self) -> pa.Table:
        """A row for each trained episode: what was done with its rows, then what was measured."""
        rows = []
        for number in range(self.state.trained_episodes):
            commit = read_json(self.store, self._layout.trained(number))
            rows.append(
                {
                    **commit["metrics"],
                    **commit["rows"],
                    **{k: commit[k] for k in ("episode", "version", "attempt", "seconds")},
                }
            )
        return from_rows(rows, _EPISODES)

    def evaluations(self) -> pa.Table:
        """A row for each evaluation that is done: the version, whose evaluation, its means."""
        rows = []
        for (version, digest), found in self.state.evaluations.items():
            if found.done:
                done = read_json(self.store, self._layout.evaluation_done(version, digest))
                said = {
                    "version": version,
                    "evaluation": digest,
                    "rows": done["rows"],
                    "quarantined": len(done["quarantined"]),
                    "seconds": done["seconds"],
                }
                rows.append({**done["metrics"], **said})
        return from_rows(rows, _EVALUATIONS)

    def newest_sampled(self) -> int:
        """The newest episode that has samples. Raises ConfigError where none has."""
        there = [n for n, e in self.state.episodes.items() if e.rollout or e.scoring]
        if not there:
            raise ConfigError(
                f"run {self.name!r} has no samples: it has sampled nothing yet, or trains on rows"
                " as they are"
            )
        return max(there)

    def samples(
        self, episodes: int | Iterable[int] | None = None, *, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The samples of an episode, of several (a range) or of all, with what was computed of
        them; docs/columns.md has the columns, and `episode` is one more.

        Files with a tombstone are left out, each other one is checked by its digest.

        Raises:
            ConfigError: nothing of an episode is committed.
            DataError: no such column.
            ShardDamageError: a file is not what was written.
        """
        state = self.state
        there = [n for n, e in state.episodes.items() if e.rollout or e.scoring]
        if episodes is None:
            wanted = there
        else:
            wanted = [episodes] if isinstance(episodes, int) else list(episodes)
        for number in wanted:
            if number not in there:
                raise ConfigError(
                    f"run {self.name!r} has no samples of episode {number}: "
                    + (
                        f"it has those of {shown_numbers(there)}"
                        if there
                        else "it has sampled nothing yet, or trains on rows as they are"
                    )
                )
        table = stacked(episode_table(self.store, state.episode(n), columns) for n in wanted)
        if wanted and not {*(columns or ())} <= {*table.column_names}:
            # Only what was asked for was read: all of an episode has the names there are.
            table = episode_table(self.store, state.episode(wanted[0]))
        return chosen(table, columns)

    def sql(self, query: str) -> pa.Table:
        """The answer of DuckDB to a query over `samples`, `episodes` and `evaluations`.

        A table that the query does not name is not read.

        Raises:
            ConfigError: DuckDB is not installed, or refuses the query.
        """
        try:
            import duckdb
        except ModuleNotFoundError as e:
            raise ConfigError(
                "OpenedRun.sql needs DuckDB, which is not installed: `pip install duckdb`, or work"
                " on the Arrow tables (.samples(), .episodes(), .evaluations())"
            ) from e
        tables = {
            "samples": self.samples,
            "episodes": self.episodes,
            "evaluations": self.evaluations,
        }
        with duckdb.connect() as connection:
            for name, read in tables.items():
                if re.search(rf"\b{name}\b", query, re.IGNORECASE):
                    connection.register(name, read())
            try:
                return connection.sql(query).to_arrow_table()
            except duckdb.Error as e:
                raise ConfigError(f"DuckDB refuses the query: {e}") from e

    def audit(self, *, digests: bool = False) -> Audit:
        """Whether everything of the run adds up, see `rlhf_flows.records.audit.audit_run`."""
        from rlhf_flows.records.audit import audit_run

        return audit_run(self.store, self.name, digests=digests)
