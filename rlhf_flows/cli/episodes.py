"""`rlhf-flows episodes | samples | audit | gc`: what a run left in its store, looked at closely."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from rlhf_flows.cli.answers import AsJson, RunName, StoreUrl, print_json, print_table
from rlhf_flows.cli.application import app

_METRICS = ("reward", "exact", "accuracy", "loss", "kl", "entropy", "response_length")
_TEXTS = ("sample_id", "prompt", "completion", "chosen", "rejected", "reward", "reward_failure")


@app.command()
def episodes(run: RunName, store: StoreUrl = "runs", as_json: AsJson = False) -> None:
    """Lists the trained episodes of a run: what became of their rows, and what was measured."""
    from rlhf_flows.records.opened_run import open_run
    from rlhf_flows.reporting.headline import headline

    opened = open_run(store, run)
    table = opened.episodes()
    rows: list[dict[str, Any]] = table.to_pylist()
    if as_json:
        print_json({"run": run, "parent": opened.parent, "episodes": rows})
        return
    # Version N + 1 is what episode N led to; few runs leave anything out.
    counts = ["episode", "trained"]
    counts += [name for name in ("filtered", "quarantined") if any(row[name] for row in rows)]
    known = {"version", "attempt", "planned", "seconds", "filtered", "quarantined", *counts}
    more = [name for name in table.column_names if name not in known]
    columns = [*counts, *headline(more, _METRICS), "seconds"]
    print_table(rows, columns, title=f"{run}: episodes")


@app.command()
def samples(
    run: RunName,
    episode: Annotated[
        int | None, typer.Option(help="Which episode; the newest that has samples if none.")
    ] = None,
    first: Annotated[int, typer.Option("--first", "-n", help="How many, as planned.", min=1)] = 8,
    best: Annotated[int | None, typer.Option(help="The K with the highest --by.", min=1)] = None,
    worst: Annotated[int | None, typer.Option(help="The K with the lowest --by.", min=1)] = None,
    by: Annotated[str, typer.Option(help="The column of numbers they are ranked by.")] = "reward",
    store: StoreUrl = "runs",
    as_json: AsJson = False,
) -> None:
    """Shows samples of an episode: prompt, completion, reward. In JSON, every column."""
    from rlhf_flows.records.opened_run import open_run
    from rlhf_flows.records.ranking import ranked

    if best is not None and worst is not None:
        raise typer.BadParameter("--best and --worst were both given: ask one after the other")
    opened = open_run(store, run)
    table = opened.samples(opened.newest_sampled() if episode is None else episode)
    if best is not None or worst is not None:
        table = ranked(table, by, descending=best is not None)
    rows = table.slice(0, best or worst or first).to_pylist()
    number = rows[0]["episode"] if rows else episode
    if as_json:
        print_json({"run": run, "episode": number, "of": table.num_rows, "samples": rows})
        return
    columns = [n for n in (*_TEXTS, by) if n in table.column_names]
    print_table(rows, list(dict.fromkeys(columns)), title=f"{run}: episode {number}")


@app.command()
def audit(
    run: RunName,
    digests: Annotated[
        bool, typer.Option(help="Read all weights and states, and check their digests.")
    ] = False,
    store: StoreUrl = "runs",
    as_json: AsJson = False,
) -> None:
    """Checks that every planned row was trained, filtered or quarantined exactly once.

    And that each committed checkpoint is there, whole. Exit code 1 where something does not add up.
    """
    from rlhf_flows.records.opened_run import open_run

    found = open_run(store, run).audit(digests=digests)
    if as_json:
        print_json(found.to_json())
    else:
        answer = found.to_json()
        columns = ["episode", "version", "planned", "trained", "filtered", "quarantined"]
        columns += ["sampled", "scored"]
        print_table(answer["episodes"], columns, title=f"{run}: rows")
        console = Console()
        how = "read" if digests else "by name and size"
        console.print(
            f"{found.folders} folders of weights and state are there ({how}), {found.deleted} were"
            f" deleted by retention; {found.evaluations} evaluations",
            soft_wrap=True,
        )
        for finding in found.findings:
            console.print(
                f"wrong: {finding.where}: {finding.says}", style="red", soft_wrap=True, markup=False
            )
        if found.ok:
            console.print("everything adds up", style="green")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def gc(
    run: RunName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    older_than_s: Annotated[
        float,
        typer.Option(help="Of folders that no commit lists: nothing written for so long.", min=0),
    ] = 3600.0,
    assume_dead: Annotated[
        bool,
        typer.Option(help="The newest attempt, on another machine and without an end, is dead."),
    ] = False,
    store: StoreUrl = "runs",
    as_json: AsJson = False,
) -> None:
    """Deletes what of a run nobody will need: folders without a commit, and what retention left.

    Beside an attempt that may be alive nothing goes that it could still commit.
    """
    from rlhf_flows.records.finding import open_existing_store
    from rlhf_flows.records.leftovers import WHY, collect_leftovers, find_leftovers

    opened = open_existing_store(store)
    act = find_leftovers if dry_run else collect_leftovers
    found = act(opened, run, older_than_s=older_than_s, assume_dead=assume_dead)
    if as_json:
        print_json({**found.to_json(), "dry_run": dry_run})
        return
    rows = [
        {"folder": f.prefix, "MiB": f.size_bytes / 2**20, "why": WHY[f.kind]} for f in found.folders
    ]
    console = Console()
    if rows:
        print_table(rows, ["folder", "MiB", "why"], title="would go" if dry_run else "gone")
    else:
        console.print(f"nothing of {run} can go")
    if found.kept_for:
        console.print(
            f"more may be left: {found.kept_for} may still commit something", soft_wrap=True
        )
