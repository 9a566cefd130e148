"""A look at what runs left: in a store, and on a cluster. Reads only, but for `release_pools`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from rich.table import Table

from rlhf_flows.data import align, from_parquet, to_samples
from rlhf_flows.pools.registry import living_actors, release_actors
from rlhf_flows.records.finding import find_run, open_existing_store
from rlhf_flows.store import (
    ObjectStore,
    RunLayout,
    RunState,
    check_run_name,
    read_json,
)

__all__ = ["list_pools", "release_pools", "show_run"]

_METRICS = ("reward", "exact", "loss", "kl", "entropy", "response_length", "grad_norm")


def show_run(url: str, run: str, *, samples: int) -> Iterator[Table]:
    """Episodes, evaluations, and samples of the last scored shard, a table each."""
    store = open_existing_store(url)
    state = find_run(store, run)
    yield _episodes(store, run, state)
    if state.evaluations:
        yield _evaluations(store, run, state)
    if samples:
        yield from _samples(store, state, samples)


def _episodes(store: ObjectStore, run: str, state: RunState) -> Table:
    rows = [
        read_json(store, RunLayout(run).trained(e))["metrics"]
        for e in range(state.trained_episodes)
    ]
    columns = [m for m in _METRICS if any(m in row for row in rows)]
    table = Table("episode", *columns, title=f"{run}: episodes")
    for number, row in enumerate(rows):
        table.add_row(str(number), *(f"{row[m]:.4f}" if m in row else "" for m in columns))
    return table


def _evaluations(store: ObjectStore, run: str, state: RunState) -> Table:
    """A row for each version and set of prompts, which is named where there are several."""
    done = {
        (version, digest): read_json(store, RunLayout(run).evaluation_done(version, digest))
        for (version, digest), evaluation in sorted(state.evaluations.items())
        if evaluation.done
    }
    rows = {key: commit["metrics"] for key, commit in done.items()}
    columns = [m for m in _METRICS if any(m in row for row in rows.values())]
    names_prompts = len({digest for _, digest in rows}) > 1
    prompts = ["prompts"] if names_prompts else []
    table = Table("version", *prompts, *columns, title=f"{run}: held-out prompts")
    for (version, digest), row in rows.items():
        of = [digest[:8]] if names_prompts else []
        table.add_row(str(version), *of, *(f"{row[m]:.4f}" if m in row else "" for m in columns))
    return table


def _samples(store: ObjectStore, state: RunState, count: int) -> Iterator[Table]:
    # A shard that is damaged is in one phase only, until it is made again.
    scored = [e for e in state.episodes.values() if e.scoring.keys() & e.rollout.keys()]
    if not scored:
        return
    last = scored[-1]
    index = min(last.scoring.keys() & last.rollout.keys())
    keys = last.rollout[index], last.scoring[index]
    sampled, rewarded = align([from_parquet(store.get(key)) for key in keys])
    batch = sampled | rewarded
    table = Table("sample", "prompt", "completion", "reward", title=f"episode {last.episode}")
    for sample in to_samples(batch)[:count]:
        table.add_row(
            str(sample.get("sample_id", "")),
            str(sample.get("prompt", ""))[-80:],
            str(sample.get("completion", ""))[:200],
            f"{float(sample['reward']):.3f}" if "reward" in sample else "",
        )
    yield table


def list_pools(address: str) -> Table:
    """Actors of all runs on a cluster."""
    table = Table("run", "pool", "replica", "rank", title=f"pools at {address}")
    for actor in asyncio.run(living_actors(address)):
        table.add_row(actor.run, actor.pool, str(actor.replica), str(actor.rank))
    return table


def release_pools(address: str, run: str) -> int:
    """Ends every actor of a run; returns how many there were."""
    return asyncio.run(release_actors(address, check_run_name(run)))
